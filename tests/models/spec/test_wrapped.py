"""Projections that no plain parameter holds: modules that are asked for their matrix, and quantised weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr import UnsupportedModel
from ffattr.models.spec import wrapped
from ffattr.models.spec.weights import read_linear

pytestmark = pytest.mark.usefixtures("one_thread")

IN, OUT = 64, 36


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eight_bits(x: Tensor, steps: int = 127) -> Tensor:
    """Each row rounded to multiples of the 127th part of its largest entry, or the 255th where it has but one sign."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / steps
    return (x / scale).round() * scale


# ---- modules that are asked


def foreign(forward: Any, base: nn.Module, package: str = "peft") -> nn.Module:
    """A layer of another package around ``base``."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = base
            self.disable_adapters = False
            self.merged_adapters: list[str] = []
            self.active_adapters = ["default"]

        def forward(self, x: Tensor) -> Any:
            return forward(self.base_layer, x)

    Wrapped.__module__ = f"{package}.tuners.new.layer"
    return Wrapped().eval()


@pytest.mark.parametrize("rows", [7, 1024])
def test_a_module_asked_for_its_matrix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "_ROWS", rows)
    module = foreign(lambda layer, x: 2 * layer(x).flip(-1), nn.Linear(IN, OUT, dtype=torch.float64))
    found, x = read_linear(module, torch.float64), random(3, IN)
    assert found.weight.shape == (IN, OUT)
    torch.testing.assert_close(found(x), module(x), rtol=0, atol=1e-13)


def test_small_weights_beside_a_large_bias() -> None:
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    base.weight.data = (0.02 * random(OUT, IN)).bfloat16()
    nn.init.constant_(base.bias, 40.0)
    found = read_linear(foreign(lambda layer, x: layer(x), base), torch.float32)
    assert torch.equal(found.bias, base.bias.float())
    error = (found.weight.T - base.weight.float()).norm() / base.weight.float().norm()
    assert error < 0.05  # 4 if the rows of an identity were not larger than 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: layer(x).relu(),
        lambda layer, x: layer(torch.where(x.sum(-1, keepdim=True) > 0, x, 2 * x)),
        lambda layer, x: layer(eight_bits(x)),
        lambda layer, x: layer(eight_bits(x, 255)),
    ],
    ids=["activation", "routed", "8 bits", "8 bits of one sign"],
)
def test_a_module_that_is_not_linear(forward: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"is a peft.tuners.new.layer.*Wrapped .* and not linear: its"):
        read_linear(foreign(forward, nn.Linear(IN, OUT)), None)


def test_only_known_packages_are_asked() -> None:
    module = foreign(lambda layer, x: layer(x), nn.Linear(IN, OUT), package="pefter")
    with pytest.raises(UnsupportedModel, match=r"a projection is a pefter.*Wrapped, expected nn.Linear"):
        read_linear(module, None)


# ---- quantised


class Packed(Tensor):
    """Rows of int8 with a scale each, much as torchao keeps them; ``rounds``: what they are multiplied with as well."""

    codes: Tensor
    scale: Tensor
    rounds: bool

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, rounds: bool) -> Any:
        self: Any = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        self.codes, self.scale, self.rounds = codes, scale, rounds
        return self

    @classmethod
    def of(cls, weight: Tensor, rounds: bool) -> Packed:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale, rounds)

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(eight_bits(x) if weight.rounds else x, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, f"{func} of packed weights"
        return cls(args[0].codes, args[0].scale, args[0].rounds)


def packed(model: nn.Module, rounds: bool = False) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Packed.of(module.weight.data, rounds), requires_grad=False)
    return model


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_that_dequantise_themselves(name: str) -> None:
    model = packed(build(name))
    assert_recomputed(*run(name, model))
    assert ffattr.attribute(model, tiny_models.inputs(name)).error.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_whose_inputs_are_rounded(dtype: torch.dtype) -> None:
    model = packed(build("llama", dtype=dtype), rounds=True)
    expected = (
        r"a projection is a torch.*Linear of .*test_wrapped.Packed and not linear: its outputs .* round its inputs"
    )
    with pytest.raises(UnsupportedModel, match=expected):
        ffattr.attribute(model, tiny_models.inputs("llama"))


class Odd(Tensor):
    pass


class Mute(Tensor):
    def dequantize(self) -> Tensor:
        raise NotImplementedError("not yet")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Odd, " and dequantises to a Odd"), (Mute, r", expected a plain .*dequantise itself \(not yet\)")],
)
def test_a_tensor_that_does_not_dequantise(kind: type[Tensor], message: str) -> None:
    module = nn.Linear(IN, OUT)
    module.weight = nn.Parameter(torch.zeros(OUT, IN).as_subclass(kind))
    with pytest.raises(UnsupportedModel, match=f"a weight is a .*{kind.__name__}{message}"):
        read_linear(module, None)


def four_bits(monkeypatch: pytest.MonkeyPatch, arranged: bool) -> nn.Module:
    """A layer as bitsandbytes has it: bytes that only the library reads, and not even that once they are arranged."""

    def dequantize(data: Tensor, state: Any) -> Tensor:
        found: Tensor = state.table[data.long()].view(state.shape)
        return found

    library: Any = ModuleType("bitsandbytes")
    library.functional = SimpleNamespace(dequantize_4bit=None if arranged else dequantize)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)

    class Linear4bit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight: Any = self.weight
            return F.linear(x, dequantize(weight.data, weight.quant_state), self.bias)

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    module, table = Linear4bit(IN, OUT, dtype=torch.float64), random(16)
    codes = torch.randint(0, 16, (IN * OUT, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight: Any = nn.Parameter(codes, requires_grad=False)
    state = {"table": table, "shape": (OUT, IN), "dtype": table.dtype, "packing_format_for_cpu": arranged}
    weight.quant_state = SimpleNamespace(**state)
    module.weight = weight
    return module.eval()


@pytest.mark.parametrize("arranged", [False, True])
def test_four_bits(arranged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = four_bits(monkeypatch, arranged)
    x = random(3, IN)
    torch.testing.assert_close(read_linear(module, torch.float64)(x), module(x), rtol=0, atol=1e-12)


def test_eight_bits_of_bitsandbytes_are_refused() -> None:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    with pytest.raises(UnsupportedModel, match=r"a bitsandbytes.nn.modules.Linear8bitLt, expected.*dequantise the"):
        read_linear(kind(IN, OUT), None)


def test_torchao() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    for name in ("llama", "bert"):
        model = build(name, dtype=torch.float32)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert ffattr.attribute(model, tiny_models.inputs(name)).error.max() < 2e-6
        model = build(name, dtype=torch.float32)
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
        with pytest.raises(UnsupportedModel, match="Int8Tensor and not linear"):
            ffattr.attribute(model, tiny_models.inputs(name))


@pytest.mark.parametrize("arranged", [False, True], ids=["as loaded", "arranged for the CPU"])
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitsandbytes(computed: torch.dtype, arranged: bool) -> None:
    """The library itself: maps are those of the dequantised weights, to the rounding of what it computes in, which no
    run takes for another architecture. On a CPU it arranges weights anew where it may, and computes in bfloat16."""
    library: Any = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    model, plain = (build("bert", dtype=torch.float32, **sizes) for _ in range(2))
    for path, linear in [*plain.encoder.layer.named_modules()]:
        if type(linear) is not nn.Linear:
            continue
        bits = library.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=computed)
        bits.load_state_dict(linear.state_dict())
        bits = bits.to("cpu").eval()
        bits.support_avx512bf16_for_cpu = bits.support_avx512bf16_for_cpu and arranged
        weight = library.functional.dequantize_4bit(bits.weight.data, bits.weight.quant_state)
        linear.weight = nn.Parameter(weight.float())
        owner, _, name = path.rpartition(".")
        setattr(model.encoder.layer.get_submodule(owner), name, bits)
    given = tiny_models.inputs("bert")
    found = ffattr.attribute(model, given, scopes="all", backend="torch")
    expected = ffattr.attribute(plain, given, scopes="all", backend="torch")
    rounding = (
        1e-6 if computed == torch.float32 and not arranged else 3e-2 if arranged else 8 * torch.finfo(computed).eps
    )
    assert found.error.max() < rounding
    for scope, tile in expected.maps.items():
        assert (found.maps[scope] - tile).norm() < rounding * tile.norm(), scope


def test_no_library_is_imported_for_a_plain_model() -> None:
    code = (
        "import sys, torch, ffattr; layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval();"
        "ffattr.attribute(layer, torch.rand(1, 3, 8), backend='torch', method='direct');"
        "print(*sorted(sys.modules.keys() & {'accelerate', 'bitsandbytes', 'peft', 'torchao', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# ---- modules of a kind that nobody knows, which dequantise what they keep and compute in a narrow dtype


class Dequantising(nn.Module):
    """Eight bits and a scale, multiplied in ``dtype`` whatever it reads."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, rounds_inputs: bool = False) -> None:
        super().__init__()
        self.in_features, self.dtype, self.rounds_inputs = base.in_features, dtype, rounds_inputs
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.float16))
        self.bias = base.bias

    def dequantise(self) -> Tensor:
        return self.codes.float() * self.scale.float()

    def forward(self, x: Tensor) -> Tensor:
        read = eight_bits(x) if self.rounds_inputs else x
        made = F.linear(read.to(self.dtype), self.dequantise().to(self.dtype))
        return made.to(x.dtype) if self.bias is None else made.to(x.dtype) + self.bias


def quantise(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
    return model


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_linears_that_compute_in_a_narrow_dtype(name: str, dtype: torch.dtype, rounding: float) -> None:
    """Under float32 hidden states: the maps are those of the dequantised weights, but for that dtype's rounding."""

    def restore(base: nn.Linear) -> nn.Module:
        found = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        found.weight.data, found.bias = Dequantising(base, dtype).dequantise(), base.bias
        return found

    quantised = quantise(build(name, dtype=torch.float32), lambda base: Dequantising(base, dtype)).eval()
    plain = quantise(build(name, dtype=torch.float32), restore).eval()
    given = tiny_models.inputs(name)
    found, expected = (ffattr.attribute(model, given, scopes="all") for model in (quantised, plain))
    assert rounding / 32 < found.error.max() < 16 * rounding
    for scope, tile in expected.maps.items():
        assert (found[scope] - tile).norm() < 8 * rounding * tile.norm(), scope
    module: Any = quantised.layers[0].mlp.up_proj if name == "llama" else quantised.encoder.layer[0].output.dense
    assert wrapped.find_compute_dtype(module) == dtype
    of_weights = read_linear(module, torch.float64).weight.T
    assert float((of_weights - module.dequantise()).abs().max()) <= rounding * float(module.dequantise().abs().max())


def test_one_that_computes_as_it_says_is_not_tolerated_more() -> None:
    module = Dequantising(nn.Linear(IN, OUT), torch.float32)
    read_linear(module, None)
    assert wrapped.find_compute_dtype(module) is None


def test_one_that_rounds_its_inputs_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Dequantising .* and not linear: its"):
        read_linear(Dequantising(nn.Linear(IN, OUT), torch.bfloat16, rounds_inputs=True).eval(), None)


def test_one_that_does_not_run() -> None:
    module = Dequantising(nn.Linear(IN, OUT), torch.float32)
    module.in_features = IN + 1
    with pytest.raises(UnsupportedModel, match=r"Dequantising, which does not run on \[1, 65\]: mat"):
        read_linear(module, None)
