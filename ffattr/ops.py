"""The contract of the four operators, in one place: ``torch.ops.ffattr.*`` and what every backend must compute.

The schemas are declared here, with a fake (so that ``torch.compile`` can trace them) and the plain PyTorch version of
`ffattr.torch_ops` as the default for every device. A binary or a Triton kernel that is present takes over per device;
without one the same call still runs.

Shapes: ``N`` query tokens, ``M`` key tokens (a block of one sequence), ``H`` heads, ``F`` feed-forward width, ``d``
model width, ``S`` streams of the feed-forward block: 1 if dense, 2 if gated (gate first, up second).

Two arguments are shared by all maps:

``alpha`` ``[H, N, M]``
    attention weights. A pair whose weights are all zero, and which is not a token with itself, gives an exact zero
    and costs nothing: causal masks and windows need no flag.
``position`` ``[N]`` int64
    the key index, within this block, of the query token itself; outside ``0..M-1`` when it is not in this block.
    The residual is "one more head", number ``H``, whose weight is 1 where ``position[n] == m`` and 0 elsewhere.

And all wide maps end alike. With ``o`` the feed-forward row of a pair and
``r = residual_scale[n] * (sum_h alpha[h, n, m] residual[m, h] + [position[n] == m] residual[m, H])`` they return
``[2, N, M]``: ``||o||`` and ``||o + r||``, or, where ``norm_scale`` is given, ``[3, N, M]`` with
``norm_scale[n] * ||gamma * centre(o + r)||`` as the third. Operators are functional, accept float32 and float64 (one
dtype for all floating arguments but ``gram``) and have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_ops

__all__ = ["OPERATORS", "SCHEMAS"]

_TAIL = "Tensor residual, Tensor? residual_scale, Tensor? gamma, Tensor? norm_scale, bool centre"

SCHEMAS = {
    # Integrated Gradients as one factor per (token, neuron), METHOD section 3.
    #   z [S, N, F] pre-activations; base [S, N or 1, F] where the path starts (None: zero); row_scale [N] is folded in.
    #   activation: a name of ffattr.ig.ACTIVATIONS; rule: "exact", "left", "right", "midpoint", "trapezoid" or
    #   "gauss-legendre", the last five with `steps` evaluations.
    #   S = 1: out[0] = row_scale * mean of g' on the path. S = 2: the factors of gate and up.
    "ig_slope": "(Tensor z, Tensor? base, Tensor? row_scale, str activation, str rule, int steps) -> Tensor",
    # Attention-level scopes by the quadratic form sqrt(a^T gram[m] a) * row_scale[n], METHOD section 6.
    #   gram [M, G, G] in float64 (a squared norm loses half the digits), G = H, or H + 1 to include the residual.
    #   Returns [N, M] in alpha's dtype.
    "gram_norms": "(Tensor alpha, Tensor position, Tensor gram, Tensor? row_scale) -> Tensor",
    # Feed-forward scopes, direct: o = (sum_s slope[s, n] * (sum_h a_h features[s, m, h])) @ down.
    #   features [S, M, H + 1, F], slope [S, N, F], down [F, d], residual [M, H + 1, d].
    "ff_norms": f"(Tensor alpha, Tensor position, Tensor features, Tensor slope, Tensor down, {_TAIL}) -> Tensor",
    # The same through one matrix per query token: J_n = (sum_s maps[s] * slope[s, n]) @ down,
    #   o = (alpha-scaled values) @ J_n, plus (sum_s slope[s, n] * own[s, n]) @ down where m is n itself.
    #   values [M, H, dh], maps [S, H * dh, F], own [S, N, F]: the residual's features of the query token itself.
    "operator_norms": "(Tensor alpha, Tensor position, Tensor values, Tensor maps, Tensor own, Tensor slope, "
    f"Tensor down, {_TAIL}) -> Tensor",
}

OPERATORS = tuple(SCHEMAS)

_library = torch.library.Library("ffattr", "DEF")


def _fake_slope(z: Tensor, *_: object) -> Tensor:
    return torch.empty_like(z)


def _fake_gram(alpha: Tensor, *_: object) -> Tensor:
    return alpha.new_empty(alpha.shape[1:])


def _fake_wide(alpha: Tensor, *rest: Tensor | bool | None) -> Tensor:
    scopes = 2 if rest[-2] is None else 3  # norm_scale
    return alpha.new_empty((scopes, *alpha.shape[1:]))


_FAKES = {
    "ig_slope": _fake_slope,
    "gram_norms": _fake_gram,
    "ff_norms": _fake_wide,
    "operator_norms": _fake_wide,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(torch_ops, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffattr::{_name}", _FAKES[_name], lib=_library)
