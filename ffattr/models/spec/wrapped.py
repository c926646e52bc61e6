"""How a loaded model keeps the numbers of a module: offloaded, quantised, or computed by an adapter of PEFT.

None of the libraries that do so is imported before the model was made with it. Row vectors: ``y = x @ weight + bias``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel

__all__ = [
    "fetch_parameters",
    "find_compute_dtype",
    "find_owner",
    "find_running",
    "is_from",
    "list_adapters",
    "make_dense",
    "read_four_bits",
    "read_matrix",
    "read_parameter",
    "read_unknown",
    "require_linear",
]

_ROWS = 1024  # of an identity matrix at once
# A power of two, which no product rounds: beside large biases, half precisions would keep few digits of small weights.
_SCALE = 256.0
# Relative. Rounding to bfloat16 gives 3e-3, rounding inputs to 8 bits (below) 9e-3 and more.
_TOLERANCE = 5e-3
# Relative errors of a product up to which it was computed in a dtype, wider ones first.
_ERRORS = {torch.float32: 2e-6, torch.float16: 8e-4}

_computed: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
"""In which dtype modules compute that were asked for their matrix, as told by their rounding."""

# Of the modules in which PEFT keeps trained copies of one: where the copies are, and the one that they were made of.
_COPIES = {"modules_to_save": "original_module", "ln_tuning_layers": "base_layer"}


def fetch_parameters(module: nn.Module) -> AbstractContextManager[object]:
    """Sees to it that the module's own parameters are where it runs; accelerate may keep them elsewhere, or on disk."""
    if "_hf_hook" not in module.__dict__:
        return nullcontext()
    context: AbstractContextManager[object] = importlib.import_module("accelerate.utils").align_module_device(module)
    return context


def make_dense(tensor: Tensor) -> Tensor:
    """Returns a plain tensor, which quantised ones (torchao's) make of themselves. Raises `UnsupportedModel`."""
    if tensor.is_meta:
        raise UnsupportedModel("a weight is on the meta device (offloaded). Load the model onto a real device first.")
    tensor = tensor.detach()
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    kind = _name_of(tensor)
    try:
        found = tensor.dequantize()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModel(
            f"a weight is a {kind}, expected a plain tensor or one that can dequantise itself ({error})"
        ) from error
    if type(found) is not Tensor:
        raise UnsupportedModel(f"a weight is a {kind} and dequantises to a {type(found).__name__}, expected a Tensor")
    return found


def read_four_bits(module: Any) -> Tensor:
    """Reads the weight ``[in, out]`` of bitsandbytes' 4-bit layers, whose inputs are not rounded."""
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # arranged anew for the CPU, for one kernel alone
        return read_matrix(module, module.in_features, module.weight.device, state.dtype)[0]
    weight: Tensor = importlib.import_module("bitsandbytes").functional.dequantize_4bit(module.weight.data, state)
    return weight.T


def find_compute_dtype(module: Any) -> torch.dtype | None:
    """Returns the dtype in which a module says that it computes, or was seen to, whatever it reads; None where neither
    is known.

    bitsandbytes' 4-bit weights that are arranged anew for the CPU are multiplied in bfloat16, whatever it says.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return torch.bfloat16
    told = getattr(module, "compute_dtype", None)
    return told if isinstance(told, torch.dtype) else _computed.get(module)


def is_from(module: nn.Module, package: str) -> bool:
    """Tells whether the module's class, or one that it derives from, belongs to a package."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def list_adapters(layer: Any) -> list[str]:
    """Lists the names of the adapters that a layer of PEFT applies beside its own module."""
    return [] if layer.disable_adapters or layer.merged_adapters else list(layer.active_adapters)


def find_running(module: nn.Module) -> nn.Module:
    """Returns the module that runs where PEFT keeps trained copies of one, and ``module`` elsewhere."""
    parts: Any = module._modules
    for copies, original in _COPIES.items():
        if copies in parts and is_from(module, "peft"):
            names = list_adapters(module)
            trained = bool(names) and all(name in parts[copies] for name in names)
            return find_running(parts[copies][names[0]] if trained else parts[original])
    return module


def read_parameter(module: nn.Module, name: str) -> Tensor:
    """Reads a parameter of a module, around which PEFT may have put what adapters add to single parameters."""
    *layers, inner = _list_inwards(module)
    added = [
        layer.get_delta_weight(one).detach()
        for layer in layers
        if getattr(layer, "parameter_name", None) == name
        for one in list_adapters(layer)
        if one in layer.lora_A
    ]
    with fetch_parameters(inner):
        return sum(added, start=make_dense(getattr(inner, name)))


def find_owner(module: nn.Module, name: str) -> Any:
    """Returns what has an attribute: the module, or one inside layers of PEFT around it."""
    found = list(_list_inwards(module))
    return next((one for one in found if hasattr(one, name)), found[-1])


def _list_inwards(module: Any) -> Iterator[Any]:
    """Yields a module and, where it is a layer of PEFT, what that is around, down to the model's own."""
    yield module
    while is_from(module, "peft") and "base_layer" in module._modules:
        module = module.base_layer
        yield module


def read_unknown(module: nn.Module, width: int, name: str) -> tuple[Tensor, Tensor]:
    """Reads weight ``[in, out]`` and bias ``[out]`` of a module of a kind that nobody knows, by what it makes of
    numbers: in float32 where it takes them, or else in its own dtype. Errors begin with ``name``.

    Raises `UnsupportedModel` where it does not run on ``[rows, width]``, or is not linear.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = next((one.device for one in tensors), torch.device("cpu"))
    if device.type == "meta":
        make_dense(tensors[0])
    own = next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)
    dtypes = dict.fromkeys((own, torch.float32) if own == torch.float64 else (torch.float32, own))
    errors = []
    for dtype in dtypes:
        try:
            return read_matrix(module, width, device, dtype)
        except UnsupportedModel:
            raise
        except Exception as error:
            errors.append(str(error))
    raise UnsupportedModel(f"{name}, which does not run on [1, {width}]: {errors[0]}")


def read_matrix(module: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Reads weight ``[in, out]`` and bias ``[out]`` of a module that is linear but keeps them in no such form.

    It is run on the rows of an identity matrix, ``width`` of them, in ``dtype`` (its own). Raises `UnsupportedModel`
    where it is not linear.
    """
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        bias = module.forward(torch.zeros(1, width, device=device, dtype=dtype))[0].to(wide)
        blocks = []
        for start in range(0, width, _ROWS):
            rows = torch.arange(min(_ROWS, width - start), device=device)
            identity = torch.zeros(len(rows), width, device=device, dtype=dtype)
            identity[rows, start + rows] = _SCALE
            blocks.append((module.forward(identity).to(wide) - bias) / _SCALE)
    weight = torch.cat(blocks)
    error = require_linear(module, weight, bias, dtype)
    seen = next((one for one, most in _ERRORS.items() if error <= most), torch.bfloat16)
    if torch.finfo(seen).eps > torch.finfo(dtype).eps:
        _computed[module] = seen
    return weight, bias


def require_linear(module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> float:
    """Returns the relative error of ``x @ weight + bias`` for what ``module`` makes of a few ``x`` in ``dtype``. Raises
    `UnsupportedModel` where it is more than rounding.

    Each has one large entry: rounded to 8 bits as a whole, as some quantised modules do, it loses the others.
    """
    width = weight.shape[0]
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for number, row in enumerate(x):
        row[number % width] = 16 * width**0.5 * (-1) ** number
    x = x.to(weight.device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        found = module.forward(x).to(wide)
        expected = x.to(wide) @ weight.to(wide)
        if bias is not None:
            expected += bias.to(wide)
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(wide).tiny))
    if not error <= _TOLERANCE and not module.training:  # which capturing refuses
        raise UnsupportedModel(
            f"a projection is a {_name_of(module)} of {_name_of(getattr(module, 'weight', None))} and not linear: its "
            f"outputs are {error:.1e} (relative) off those of its matrix. It may round its inputs, or choose for each "
            "token what to apply. Merge or remove its adapters, or load the model with plain weights."
        )
    return error


def _name_of(found: object) -> str:
    return f"{type(found).__module__}.{type(found).__name__}"
