"""The layer description: parameters in row-vector form, norms in two parts, attention without its weights."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from recording import run
from tiny_models import FAMILIES, build
from torch import Tensor, nn
from torch.nn import functional as F

from ffattr.decomposition.affine import Norm
from ffattr.decomposition.attention import QueryKey
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.models.spec.weights import Columns
from ffattr.models.spec.weights import Scaled as LayerScale

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, FF = 12, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(**parts: Any) -> LayerSpec:
    """A layer of plain modules, some of them replaced."""
    modules: dict[str, Any] = {
        "module": nn.Identity(),
        "attention": nn.Identity(),
        "value": nn.Linear(WIDTH, WIDTH),
        "out": nn.Linear(WIDTH, WIDTH),
        "up": nn.Linear(WIDTH, FF),
        "down": nn.Linear(FF, WIDTH),
    }
    return LayerSpec(**{"heads": 3, "kv_heads": 3, "activation": F.gelu, **modules, **parts})


# ---- parameters


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_module_in_row_vectors(bias: bool) -> None:
    module = nn.Linear(WIDTH, FF, bias=bias)
    linear = spec(up=module).weights(torch.float64).branches[0].up
    assert linear.weight.shape == (WIDTH, FF)
    assert (linear.bias is None) != bias
    x = random(5, WIDTH)
    torch.testing.assert_close(linear(x), module.double()(x))


def test_conv1d_keeps_its_orientation() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(FF, WIDTH)
    nn.init.normal_(conv.bias)
    linear = spec(up=conv).weights(torch.float64).branches[0].up
    assert linear.weight.shape == (WIDTH, FF)
    x = random(5, WIDTH)
    torch.testing.assert_close(linear(x), conv.double()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_a_fused_projection(bias: bool) -> None:
    fused = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
    value = spec(value=Columns(fused, 2 * WIDTH, 3 * WIDTH)).weights(torch.float64).value
    x = random(5, WIDTH)
    torch.testing.assert_close(value(x), fused.double()(x)[:, 2 * WIDTH :])


def test_columns_of_conv1d_are_output_features() -> None:
    model = build("gpt2")
    attention = model.h[0].attn
    value = resolve(model).layers[0].weights(torch.float64).value
    x = random(5, 40)
    torch.testing.assert_close(value(x), attention.c_attn(x).split(40, -1)[2])


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_multihead_attention(bias: bool) -> None:
    attention = nn.MultiheadAttention(WIDTH, 3, bias=bias, dtype=torch.float64)
    value = spec(value=Columns(attention, 2 * WIDTH, 3 * WIDTH)).weights(torch.float64).value
    x = random(5, WIDTH)
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    torch.testing.assert_close(value(x), parts[:, 2 * WIDTH :])


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_every_group(bias: bool) -> None:
    """Query, key and value of each of three heads side by side."""
    fused = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
    value = spec(value=Columns(fused, 8, 12, groups=3)).weights(torch.float64).value
    x = random(5, WIDTH)
    torch.testing.assert_close(value(x), fused.double()(x).view(5, 3, 12)[..., 8:].flatten(1))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_scale(bias: bool) -> None:
    module, factor = nn.Linear(WIDTH, WIDTH, bias=bias), random(WIDTH, seed=1)
    out = spec(out=LayerScale(module, factor)).weights(torch.float64).out
    x = random(5, WIDTH)
    torch.testing.assert_close(out(x), module.double()(x) * factor)


def test_sinks_take_attention_that_no_token_gets() -> None:
    query, key, sinks = random(2, 4, 3), random(1, 4, 3, seed=1), random(2, seed=2)
    attention = QueryKey(query, key, scale=0.5, causal=True, sinks=sinks)
    rows = torch.tensor([2, 0])
    logits = (0.5 * query @ key.mT)[:, rows].masked_fill(torch.arange(4) > rows[:, None], -torch.inf).exp()
    expected = logits / (logits.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(attention.attention_weights(rows), expected)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["value", "out", "up", "down"])
def test_a_subclass_of_linear_is_refused(part: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"a projection is a .*\.Scaled, expected nn\.Linear.*merge_and_unload"):
        spec(**{part: Scaled(WIDTH, WIDTH)}).weights(torch.float32)


def test_a_norm_that_computes_something_else_is_refused() -> None:
    class OddRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    with pytest.raises(UnsupportedModel, match=r"OddRMSNorm that computes neither a LayerNorm nor an RMSNorm"):
        spec(norm_before_ff=OddRMSNorm(WIDTH)).weights(torch.float32)


@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_is_what_it_computes(kind: type[nn.Module], one: int) -> None:
    """T5LayerNorm does not centre; Gemma's and Nemotron's gains are one more than their weights."""

    class MisnamedLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(random(WIDTH)), 1e-3

        def forward(self, x: Tensor) -> Tensor:
            norm = kind(WIDTH, eps=self.eps, elementwise_affine=False)
            return norm(x) * (self.weight + one)

    module = MisnamedLayerNorm()
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    p = random(5, WIDTH)
    torch.testing.assert_close(norm(p), module(p))


def test_a_module_that_is_no_norm_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"a norm is a .*GroupNorm, expected nn\.LayerNorm or an RMSNorm"):
        spec(norm_before_ff=nn.GroupNorm(1, WIDTH)).weights(torch.float32)


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="meta device"):
        spec(up=nn.Linear(WIDTH, FF, device="meta")).weights(torch.float32)


def test_weights_take_the_dtype_and_carry_no_gradient() -> None:
    weights = spec(norm_after_ff=nn.LayerNorm(WIDTH), gate=nn.Linear(WIDTH, FF)).weights(torch.float64)
    tensors = dict(weights.tensors())
    names = {"value", "out", "up", "gate", "down", "norm_after_ff"}
    assert set(tensors) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes(name: str) -> None:
    weights = resolve(build(name)).layers[0].weights(torch.float32)
    llama = weights.branches[0].gate is not None
    heads = 6 if llama else 4 if name in ("torch-even-heads", "torch-layer") else 5
    head_dim = 10 if name == "llama-bias" else (48 if llama else 40) // heads
    assert (weights.width, weights.branches[0].width) == ((48, 76) if llama else (40, 52))
    assert (weights.heads, weights.head_dim) == (heads, head_dim)


@pytest.mark.parametrize(
    ("norms", "scopes"),
    [
        ((), ("atb", "atb_ff", "atb_ff_res")),
        (("norm_before_attn",), ("atb", "atb_ff", "atb_ff_res")),
        (("norm_before_attn", "norm_before_ff"), ("atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")),
        (("norm_after_attn", "norm_after_ff"), ("attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln")),
        (("norm_before_ff", "norm_after_ff"), ("atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res", "atb_ln_ff_res_ln")),
    ],
)
def test_scopes_follow_the_norms(norms: tuple[str, ...], scopes: tuple[str, ...]) -> None:
    layer = spec(**{name: nn.LayerNorm(WIDTH) for name in norms})
    assert layer.scopes == ("attn_heads", "attn", *scopes)
    assert layer.weights(torch.float32).scopes == layer.scopes


# ---- norms


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_parts(kind: str, affine: bool) -> None:
    module = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(WIDTH, eps=0.1, elementwise_affine=affine).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random(WIDTH, seed=seed)
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    assert norm.kind == kind
    p, q, matrix = random(5, WIDTH, seed=4), random(5, WIDTH, seed=5), random(7, WIDTH, seed=6)
    torch.testing.assert_close(norm(p), module(p))
    torch.testing.assert_close(norm.affine(p, norm.scale(p)), module(p))
    torch.testing.assert_close(p[:, :7] @ norm.linear(matrix), norm.linear(p[:, :7] @ matrix))
    torch.testing.assert_close(norm.linear(p + q), norm.linear(p) + norm.linear(q))
    # Completeness with frozen statistics: the parts of a sum, and the shift once.
    scale = norm.scale(p + q)
    torch.testing.assert_close(norm.linear(p) * scale[:, None] + norm.affine(q, scale), module(p + q))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_with_its_default_eps(dtype: torch.dtype, affine: bool) -> None:
    module = nn.RMSNorm(WIDTH, elementwise_affine=affine, dtype=dtype)
    norm = spec(norm_before_ff=module).weights(dtype).norm_before_ff
    assert norm is not None
    p = random(3, WIDTH).to(dtype) * torch.finfo(dtype).eps ** 0.5  # where eps weighs as much as the input
    torch.testing.assert_close(norm(p), module(p))


# ---- attention


def attention(mask: Tensor | None = None, causal: bool = False, batch: int = 2, tokens: int = 5) -> QueryKey:
    return QueryKey(random(batch, 6, tokens, 4, seed=1), random(batch, 2, tokens, 4, seed=2), 0.7, mask, causal)


def weights_of(given: QueryKey, batch: int) -> Tensor:
    """Softmax by PyTorch's own attention: with the identity as values, its output is the weights."""
    tokens = given.query.shape[2]
    mask = given.mask
    if given.causal:
        lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = lower if mask is None else mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, -1e300)
    eye = torch.eye(tokens, dtype=torch.float64).expand(len(given.query), 6, tokens, tokens)
    key = given.key.repeat_interleave(3, dim=1)
    return F.scaled_dot_product_attention(given.query, key, eye, mask, scale=given.scale)[batch]


def masks(tokens: int = 5) -> dict[str, Tensor | None]:
    allowed = random(2, 1, tokens, tokens, seed=3) > -0.3
    allowed |= torch.eye(tokens, dtype=torch.bool)  # no row without a key
    additive = torch.zeros(allowed.shape, dtype=torch.float64)
    padding = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    padding[1, ..., -2:] = False
    lowest = torch.finfo(torch.float64).min
    return {
        "none": None,
        "bool": allowed,
        "one for all sequences": allowed[:1],
        "additive": additive.masked_fill(~allowed, lowest),
        "infinite": additive.masked_fill(~allowed, -torch.inf),
        "float32": additive.float().masked_fill(~allowed, torch.finfo(torch.float32).min),
        "bias": random(2, 6, tokens, tokens, seed=4),
        "padding": padding,
        "additive padding": torch.zeros(padding.shape, dtype=torch.float64).masked_fill(~padding, -torch.inf),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_logits(name: str, causal: bool) -> None:
    mask = masks()[name]
    given = attention(mask, causal)
    rows = torch.tensor([3, 0, 4, 3])
    for batch in (0, 1):
        sequence = given.sequence(batch, torch.arange(5), torch.float64)
        wide = given if mask is None or mask.dtype == torch.bool else attention(mask.double(), causal)
        expected = weights_of(wide, batch)[:, rows]
        torch.testing.assert_close(sequence.logits(rows).softmax(-1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", masks())
def test_a_sequence_without_some_tokens(name: str) -> None:
    mask, kept = masks()[name], torch.tensor([0, 1, 4])
    sequence = attention(mask).sequence(1, kept, torch.float64)
    assert (sequence.query.shape, sequence.key.shape) == ((6, 3, 4), (2, 3, 4))
    whole = attention(mask).sequence(1, torch.arange(5), torch.float64).logits(torch.arange(5))
    assert torch.equal(sequence.logits(torch.arange(3)), whole[:, kept][:, :, kept])
    assert sequence.logits(torch.arange(3)).dtype == torch.float64
    assert attention(mask).sequence(1, kept, torch.float32).logits(torch.arange(3)).dtype == torch.float32


def test_logits_leave_query_key_and_mask_alone() -> None:
    given = attention(masks()["additive"]).sequence(0, torch.arange(5), torch.float64)
    assert given.mask is not None
    tensors = (given.query, given.key, given.mask)
    before = [t.clone() for t in tensors]
    given.logits(torch.arange(5))
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_pairs_counts_what_may_attend(name: str, causal: bool) -> None:
    rows = torch.tensor([4, 2, 0])
    for batch in (0, 1):
        sequence = attention(masks()[name], causal).sequence(batch, torch.arange(5), torch.float64)
        alive = (sequence.logits(rows) > torch.finfo(torch.float32).min / 2).any(0)
        assert sequence.pairs(rows) == int(alive.sum())


def test_a_pair_masked_for_some_heads_counts() -> None:
    mask = torch.ones(1, 6, 5, 5, dtype=torch.bool)
    mask[:, :5, 0, 1] = False
    mask[:, :, 0, 2] = False
    assert attention(mask).sequence(0, torch.arange(5), torch.float64).pairs(torch.tensor([0])) == 4


def test_looks_ahead() -> None:
    lower = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(lower.shape).masked_fill(~lower, torch.finfo(torch.float32).min)
    assert attention().looks_ahead
    assert not attention(causal=True).looks_ahead
    assert not attention(lower).looks_ahead
    assert not attention(additive).looks_ahead
    assert not attention(additive.masked_fill(~lower, -torch.inf)).looks_ahead
    assert attention(lower[..., -1:, :]).looks_ahead  # keys alone: padding
    one = lower.expand(2, -1, -1, -1).clone()
    one[1, 0, 0, 4] = True
    assert attention(one).looks_ahead


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "torch-pre"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_only_decoders_look_back(name: str, padding: str | None) -> None:
    _, records, _ = run(name, build(name), tiny_models.inputs(name, padding=padding))
    assert [r.attention.looks_ahead for r in records] == [name in ("bert", "torch-pre")] * 2


def test_a_norm_without_parameters_centres_only() -> None:
    p = random(3, WIDTH)
    assert torch.equal(Norm("rms", None, None, 0.0).linear(p), p)
    assert torch.equal(Norm("layer", None, None, 0.0).linear(p), p - p.mean(-1, keepdim=True))
