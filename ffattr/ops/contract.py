"""The contract of the four operators, in one place: ``torch.ops.ffattr.*`` and what every backend must compute.

The schemas are declared here, with a fake (so that ``torch.compile`` can trace them) and the plain PyTorch version of
`ffattr.ops.torch_kernels` as the default for every device. A binary or a Triton kernel that is present takes over per
device; without one the same call still runs. ``torch.ops.ffattr_cuda.*`` are the same operators by the compiled CUDA
kernels alone: for CUDA tensors ``torch.ops.ffattr.*`` is a Python function that picks (`ffattr.ops.backends`), and what
is picked has to have a name of its own. ``operator_norms`` has no CUDA kernel: there its PyTorch version runs, which
leaves the products to cuBLAS.

Shapes: ``N`` query tokens, ``M`` key tokens (a block of one sequence), ``H`` heads, ``F`` feed-forward width, ``d``
model width, ``S`` streams of the feed-forward block: 1 if dense, 2 if gated (gate first, up second).

Three arguments are shared by all maps:

``alpha`` ``[H, N, M]``
    attention weights. A pair whose weights are all zero, and which is not a token with itself, gives an exact zero
    and costs nothing: causal masks and windows need no flag.
``position`` ``[N]`` int64
    the key index, within this block, of the query token itself; outside ``0..M-1`` when it is not in this block.
    The residual is "one more head", number ``H``, whose weight is 1 where ``position[n] == m`` and 0 elsewhere.
``sequences`` ``[B + 1, 2]`` int64 on the CPU, or None
    several sequences of different length in one call, without padding work. Row ``b`` is (first query, first key) of
    sequence ``b``: (0, 0) in the first row, (``N``, number of keys ``K``) in the last. Queries ``sequences[b, 0]`` up
    to ``sequences[b + 1, 0]`` meet only keys ``sequences[b, 1]`` up to ``sequences[b + 1, 1]``, which are columns 0, 1,
    ... of their rows of ``alpha``; ``position`` counts these columns. ``M`` is at least the longest sequence's number
    of keys. Columns beyond a sequence's keys are padding: ``alpha`` is not read there and the result is exactly 0.
    What has a row for each key (``features``, ``values``, ``residual``, ``gram``) then has ``K`` of them instead of
    ``M``, one sequence after the other. None is one sequence, with ``K = M``.

And all wide maps end alike. With ``o`` the feed-forward row of a pair and
``r = residual_scale[n] * (sum_h alpha[h, n, m] residual[m, h] + [position[n] == m] residual[m, H])`` they return
``[2, N, M]``: ``||o||`` and ``||o + r||``, or, where ``norm_scale`` is given, ``[3, N, M]`` with
``norm_scale[n] * ||gamma * centre(o + r)||`` as the third. ``residual_scale`` is a norm's ``1 / s_n``, never zero.
``reduction`` says what stands in the place of each norm: ``"l2"`` that, ``"l1"`` the sum of magnitudes, ``"alti"``
``max(0, ||y||_1 - ||y - v||_1)`` of the vector ``v`` and of ``y = totals[scope, n]``, ``totals`` ``[2 or 3, N, d]``
(`ffattr.ops.reduction`; a row is not divided by its sum). Where there are no neurons, ``F = 0``, ``o`` is
zero: so vectors before the feed-forward block are reduced by ``ff_norms`` as well.
``triangular`` says that ``down`` is zero right of its diagonal (``down[i, j] = 0`` where ``j > i``), so that kernels
may leave out these products, a share ``d / 2F`` of all (`ffattr.engine.planning.rotation`); those that do not give the
same.
Operators are functional and have no gradient. A neuron whose slopes are exactly zero counts as nothing, whatever its
features or row of ``down``: kernels may skip it.

Dtypes: ``alpha``, ``residual_scale``, ``gamma``, ``norm_scale``, ``totals``, ``down_scale`` and the ``row_scale`` of
``gram_norms`` share one, float32 or float64, which the result takes. The wide operands (``features``, ``slope``,
``down``, ``residual``, ``values``, ``maps``, ``own``) share one too: that same, or bfloat16 or float16. Then the wide
products are in the narrow dtype and the norms in ``alpha``'s, and a pair's weights are divided by their largest
magnitude before they are rounded, so that tiny ones keep their digits. With ``down_scale``, ``down`` is float8_e4m3fn
and the other wide operands are bfloat16. The C++ kernels take float32, float64, and bfloat16 beside float32, and refuse
the rest; also ``down`` alone in bfloat16 beside float32 operands, which is what the engine gives them: what is
multiplied by it is then rounded once, as it is made.

Two tokens, one head, vectors of norm 2 and 3 (so grams 4 and 9); the second token attends to both equally:

>>> alpha = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])  # [H, N, M]
>>> gram = torch.tensor([[[4.0]], [[9.0]]], dtype=torch.float64)  # [M, H, H]
>>> torch.ops.ffattr.gram_norms(alpha, torch.tensor([0, 1]), gram, None)
tensor([[2.0000, 0.0000],
        [1.0000, 1.5000]])
>>> z = torch.tensor([[[-2.0, 0.0, 3.0]]])  # [S, N, F]
>>> torch.ops.ffattr.ig_slope(z, None, None, "gelu", "exact", 0)  # gelu(z) / z, and its limit at 0
tensor([[[0.0228, 0.5000, 0.9987]]])
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import torch_kernels
from .reduction import Reduction

__all__ = ["MOST_HEADS", "OPERATORS", "SCHEMAS", "Epilogue", "Operators"]

MOST_HEADS = 128
"""The kernels for GPUs are written for up to this many: a tile holds the weights of all heads, and a wider one would
leave no registers for the product."""

_TAIL = (
    "Tensor residual, Tensor? residual_scale, Tensor? gamma, Tensor? norm_scale, bool centre, Tensor? sequences=None, "
    'str reduction="l2", Tensor? totals=None, bool triangular=False'
)

SCHEMAS = {
    # Integrated Gradients as one factor per (token, neuron), see `ffattr.decomposition`.
    #   z [S, N, F] pre-activations; base [S, N or 1, F] where the path starts (None: zero); row_scale [N] is folded in.
    #   activation: a name of ffattr.decomposition.integrated_gradients.ACTIVATIONS; rule: "exact", "left", "right",
    #   "midpoint", "trapezoid" or
    #   "gauss-legendre", the last five with `steps` evaluations.
    #   S = 1: out[0] = row_scale * mean of g' on the path. S = 2: the factors of gate and up. z may be of a half type
    #   too (not for the C++ kernel): computed in float32, returned as z's dtype; row_scale is float32 then, or like z.
    "ig_slope": "(Tensor z, Tensor? base, Tensor? row_scale, str activation, str rule, int steps) -> Tensor",
    # Attention-level scopes by the quadratic form sqrt(a^T gram[m] a) * row_scale[n].
    #   gram [M, G, G] in float64 (a squared norm loses half the digits), G = H, or H + 1 to include the residual.
    #   Returns [N, M] in alpha's dtype.
    "gram_norms": "(Tensor alpha, Tensor position, Tensor gram, Tensor? row_scale, Tensor? sequences=None) -> Tensor",
    # Feed-forward scopes, direct: o = (sum_s slope[s, n] * (sum_h a_h features[s, m, h])) @ down.
    #   features [S, M, H + 1, F], slope [S, N, F], down [F, d], residual [M, H + 1, d].
    #   down_scale [d]: where given, down is float8_e4m3fn and stands for down * down_scale.
    "ff_norms": "(Tensor alpha, Tensor position, Tensor features, Tensor slope, Tensor down, Tensor? down_scale, "
    f"{_TAIL}) -> Tensor",
    # The same through one matrix per query token: J_n = (sum_s maps[s] * slope[s, n]) @ down,
    #   o = (alpha-scaled values) @ J_n, plus (sum_s slope[s, n] * own[s, n]) @ down where m is n itself.
    #   values [M, H, dh], maps [S, H * dh, F], own [S, N, F]: the residual's features of the query token itself.
    "operator_norms": "(Tensor alpha, Tensor position, Tensor values, Tensor maps, Tensor own, Tensor slope, "
    f"Tensor down, {_TAIL}) -> Tensor",
}

OPERATORS = tuple(SCHEMAS)


class Epilogue(NamedTuple):
    """The last operands of both wide operators: what is added to each vector, the norm that follows, what a vector is
    reduced to, and whether ``down`` is zero right of its diagonal."""

    residual: Tensor
    residual_scale: Tensor | None = None
    gamma: Tensor | None = None
    norm_scale: Tensor | None = None
    centre: bool = False
    sequences: Tensor | None = None
    reduction: Reduction = "l2"
    totals: Tensor | None = None
    triangular: bool = False


class Operators(Protocol):
    """Has the four operators, as a backend implements them; `SCHEMAS` says what they compute, and gives the shapes."""

    def __hash__(self) -> int: ...  # what was found out about them is remembered

    def ig_slope(
        self, z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str, rule: str, steps: int
    ) -> Tensor: ...

    def gram_norms(
        self, alpha: Tensor, position: Tensor, gram: Tensor, row_scale: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor: ...

    def ff_norms(
        self,
        alpha: Tensor,
        position: Tensor,
        features: Tensor,
        slope: Tensor,
        down: Tensor,
        down_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        gamma: Tensor | None,
        norm_scale: Tensor | None,
        centre: bool,
        sequences: Tensor | None = None,
        reduction: Reduction = "l2",
        totals: Tensor | None = None,
        triangular: bool = False,
    ) -> Tensor: ...

    def operator_norms(
        self,
        alpha: Tensor,
        position: Tensor,
        values: Tensor,
        maps: Tensor,
        own: Tensor,
        slope: Tensor,
        down: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        gamma: Tensor | None,
        norm_scale: Tensor | None,
        centre: bool,
        sequences: Tensor | None = None,
        reduction: Reduction = "l2",
        totals: Tensor | None = None,
        triangular: bool = False,
    ) -> Tensor: ...


_libraries = [torch.library.Library(namespace, "DEF") for namespace in ("ffattr", "ffattr_cuda")]


def _fake_slope(z: Tensor, *_: object) -> Tensor:
    return torch.empty_like(z)


def _fake_gram(alpha: Tensor, *_: object) -> Tensor:
    return alpha.new_empty(alpha.shape[1:])


def _fake_wide(operator: str) -> Callable[..., Tensor]:
    # Counted from the front: the dispatcher leaves out trailing arguments that have their default.
    at = list(inspect.signature(getattr(torch_kernels, operator)).parameters).index("norm_scale")

    def fake_norms(*arguments: Tensor) -> Tensor:
        alpha, scopes = arguments[0], 2 if arguments[at] is None else 3
        return alpha.new_empty((scopes, *alpha.shape[1:]))

    return fake_norms


_FAKES = {
    "ig_slope": _fake_slope,
    "gram_norms": _fake_gram,
    "ff_norms": _fake_wide("ff_norms"),
    "operator_norms": _fake_wide("operator_norms"),
}


def _require_plain(operator: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes plain PyTorch, where tensors of all kinds arrive that no kernel is for, refuse what it cannot compute."""

    @functools.wraps(kernel)
    def compute(*arguments: Any, **named: Any) -> Tensor:
        for argument in (*arguments, *named.values()):
            if isinstance(argument, Tensor) and (argument.layout != torch.strided or argument.is_quantized):
                kind = "quantized" if argument.is_quantized else str(argument.layout).removeprefix("torch.")
                raise ValueError(f"{operator}: a tensor {list(argument.shape)} is {kind}, expected dense ones")
        return kernel(*arguments, **named)

    return compute


for _library in _libraries:
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name, _require_plain(_name, getattr(torch_kernels, _name)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_library.ns}::{_name}", _FAKES[_name], lib=_library)
