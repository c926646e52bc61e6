"""How the user's own model is run: in eval mode, by any number of threads, and leaving nothing behind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CaptureError, FfattrError, ForwardError
from .passes import begin_pass, share_change

__all__ = [
    "Reached",
    "call_model",
    "find_device",
    "find_switches",
    "list_configs",
    "list_given_tensors",
    "read_hidden_states",
    "require_same",
    "run_undisturbed",
]

# Relative difference of the final hidden states above which recording is taken to have changed the model's output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_CHANCE = ("drop", "jitter", "noise")  # of what the attributes of chances are called
_BY_MODE = (nn.modules.batchnorm._NormBase, nn.RReLU, nn.RNNBase)


@contextmanager
def run_undisturbed(base: nn.Module) -> Iterator[None]:
    """Runs in here see every hook and keep no gradients, whatever other threads do meanwhile.

    Raises `CaptureError` for a model in training mode.
    """
    training = _find_training(base)
    if training is not None:
        raise CaptureError(
            f"{type(base).__name__} is in training mode at {training}, where dropout makes every run different. Call "
            "model.eval()."
        )
    with ExitStack() as stack, stack:
        stack.enter_context(begin_pass())
        stack.enter_context(torch.no_grad())
        stack.enter_context(share_change("compilation", _switch_off_compilation))
        stack.enter_context(share_change("fast path", _switch_off_fastpath))
        yield


def _find_training(base: nn.Module) -> str | None:
    """Returns the first module that acts differently in training and is in that mode, by its path and class.

    Those are dropout, norms of a batch, and modules whose own forward asks for the mode.
    """
    for path, module in base.named_modules():
        if not module.training or isinstance(module, nn.Identity):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            acts = module.p > 0
        else:
            acts = isinstance(module, _BY_MODE) or _asks_for_mode(module)
        if acts:
            return f"{path!r} ({type(module).__name__})" if path else "its own forward"
    return None


def _asks_for_mode(module: nn.Module) -> bool:
    """Tells whether a module's own forward asks whether it is in training, for more than what is switched off.

    That is what it drops, if the probability is zero, gradient checkpointing, and the choice of a faster kernel.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "training" not in code.co_names:
        return False
    if type(module) in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        return False
    named = {name: getattr(module, name, None) for name in code.co_names}
    dropped = [value for name, value in named.items() if any(word in name for word in _CHANCE)]
    chances = [getattr(value, "p", value) for value in dropped]
    numbers = [value for value in chances if isinstance(value, (int, float))]
    if chances and len(numbers) == len(chances):
        return max(numbers) > 0
    return named.get("gradient_checkpointing") is not False


def call_model(model: nn.Module, kwargs: Mapping[str, Any], raised: Sequence[BaseException] = ()) -> Any:
    """Calls ``model(**kwargs)``. Raises `ForwardError` for what it raises, with that as the cause.

    Errors of ffattr, and of callbacks that run meanwhile and note theirs in ``raised``, come as they are.
    """
    try:
        return model(**kwargs)
    except (FfattrError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if raised:
            raise
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list_given_tensors(kwargs))
        words = str(error) or type(error).__name__
        raise ForwardError(f"{type(model).__name__} does not run on {shapes or 'these inputs'}: {words}") from error


def list_given_tensors(given: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Lists the tensors among arguments and in mappings among them, ids first."""
    flat: list[tuple[str, Any]] = []
    for name, value in given.items():
        flat += list(value.items()) if isinstance(value, Mapping) else [(name, value)]
    found = [(name, value) for name, value in flat if isinstance(value, Tensor)]
    return sorted(found, key=lambda one: one[0] != "input_ids")


class Reached(BaseException):
    """Carries what was ``found`` out of a forward pass that need not go on, past any handler of errors on its way."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


def find_switches(base: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments that keep the model from caching, or from collecting what nobody asked for."""
    found: dict[str, Any] = {}
    if "use_cache" in kwargs or "use_cache" in inspect.signature(base.forward).parameters:
        found["use_cache"] = False
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(getattr(base, "config", None), name, False):
            found[name] = False
    return found


def list_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Lists each configuration of a transformers model, all of whose ``modules`` are given, or of its parts that names
    an attention implementation."""
    # Whoever asks a module for what it does not have waits a hundred times as long.
    having = (module for module in modules if "config" in module.__dict__ or hasattr(type(module), "config"))
    found = [getattr(module, "config", None) for module in having]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


def _switch_off_fastpath(undo: ExitStack) -> None:
    """PyTorch's fused encoder layer calls no hooks, and takes any float mask for a boolean one (NaN in torch 2.13)."""
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _switch_off_compilation(undo: ExitStack) -> None:
    """What is compiled runs eagerly here: hooks added after torch.compile never fire in the compiled code, and where
    they are seen Dynamo compiles them, too. Nothing can be compiled, in a module or a function, before Dynamo is there.
    """
    if "torch._dynamo" in sys.modules:
        undo.enter_context(torch.compiler.set_stance("force_eager"))


def find_device(base: nn.Module) -> torch.device:
    """Returns where the first parameter lies; the CPU for weights that accelerate brings in when needed."""
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def read_hidden_states(output: Any) -> Tensor:
    """Returns the final hidden states ``[B, T, d]`` of a tensor, a tuple or a transformers ModelOutput."""
    found = next(_list_tensors(output), None)
    if found is None:
        raise CaptureError(f"the model returned a {type(output).__name__} that holds no tensor")
    return found


def _list_tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors of an output in order; of a mapping, those in lists (feature maps) last, from their end."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (value for value in output.values() if isinstance(value, Tensor))
        for value in output.values():
            if not isinstance(value, Tensor):
                yield from _list_tensors(value[::-1] if isinstance(value, (tuple, list)) else value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _list_tensors(value)


def require_same(plain: Tensor, recorded: Tensor, base: nn.Module, mask: Tensor | None) -> None:
    """Raises `CaptureError` where recording changed the final hidden states, ``[B, T, d]`` or of another layout.

    Where ``mask`` has the layout of their first two dimensions, only of the tokens where it is True.
    """
    if mask is not None and plain.dim() == 3 and plain.shape[:2] == mask.shape:
        plain, recorded = plain[mask.to(plain.device)], recorded[mask.to(plain.device)]
    plain, recorded = plain.double(), recorded.double()
    error = float((recorded - plain).norm() / plain.norm().clamp_min(1e-30))
    tolerance = _TOLERANCE.get(_find_narrowest_dtype(base, plain.device.type), 1e-4)
    if not error <= tolerance:
        raise CaptureError(
            f"recording changed output of {type(base).__name__}: the final hidden states differ by {error:.1e} "
            f"(relative), expected at most {tolerance:.0e}. The model is random in eval mode, or its attention "
            'implementation differs from sdpa; try model.set_attn_implementation("sdpa") or "eager".'
        )


def _find_narrowest_dtype(base: nn.Module, device_type: str) -> torch.dtype:
    """Returns the narrowest floating dtype of the parameters, or of autocast."""
    found = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device_type):
        found.add(torch.get_autocast_dtype(device_type))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
