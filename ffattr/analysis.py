"""What the feed-forward block changes in the maps (Kobayashi et al. 2024, section 5).

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas

__all__ = ["Maps", "contextualization_change", "spearman"]

_COMPONENTS = {"ff": "FF", "res": "RES", "ln": "LN"}
_BLOCK = "FF block"


class Maps(Protocol):
    """What the analyses read of an `ffattr.Attribution`."""

    @property
    def maps(self) -> Mapping[str, Tensor]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def queries(self) -> Sequence[int]: ...
    @property
    def scopes(self) -> Sequence[str]: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def key_mask(self) -> Tensor | None: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


def contextualization_change(attribution: Maps) -> pandas.DataFrame:
    """How much each component between two neighbouring scopes rearranges the map: ``1 - Spearman rho``.

    One row per layer and component: ``layer``, ``component`` (``FF``, ``RES``, ``LN`` or the whole ``FF block``),
    ``before``, ``after`` (the two scopes) and ``value``, the mean over the sequences. Only pairs of real tokens count,
    and in a causal model (``arguments["causal"]``) only those where the key is not after the query: the structural
    zeros would agree by themselves.
    """
    import pandas as pd

    steps = _steps(attribution.scopes)
    if not steps:
        raise ValueError(
            f"no two neighbouring scopes of the feed-forward block among {', '.join(attribution.scopes)}: compute the "
            "maps with scopes='all' (or name the scopes around the component)"
        )
    pairs = _pairs(attribution)
    rows = []
    for place, layer in enumerate(attribution.layers):
        for component, before, after in steps:
            first, second = attribution.maps[before][place], attribution.maps[after][place]
            changes = torch.tensor([1 - spearman(a[p], b[p]) for a, b, p in zip(first, second, pairs, strict=True)])
            rows.append((layer, component, before, after, float(changes.nanmean())))
    return pd.DataFrame(rows, columns=["layer", "component", "before", "after", "value"])


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of all elements of ``a`` and ``b``, ties at their average rank.

    NaN where it is not defined: fewer than two elements, or all elements of one side equal.
    """
    if a.shape != b.shape:
        raise ValueError(f"rank correlation needs equal shapes, got {list(a.shape)} and {list(b.shape)}")
    first, second = _ranks(a.flatten()), _ranks(b.flatten())
    first, second = first - first.mean(), second - second.mean()
    spread = first.norm() * second.norm()
    return float(first @ second / spread) if spread > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, in float64; equal values share the mean of their places."""
    _, place, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    average: Tensor = last - (counts.double() - 1) / 2
    return average[place]


def _steps(scopes: Sequence[str]) -> list[tuple[str, str, str]]:
    """``(component, scope before, scope after)``. A scope's name is its predecessor's plus the component added."""
    steps = []
    for scope in scopes:
        before, _, part = scope.rpartition("_")
        if part in _COMPONENTS and before.startswith("atb") and before in scopes:
            steps.append((_COMPONENTS[part], before, scope))
    whole = [scope for scope in scopes if scope.startswith("atb") and scope.endswith(("_ln_ff_res", "_ff_res_ln"))]
    last = max(whole, key=len, default="")  # of a pre-LN or of a post-LN layer
    if "atb" in scopes and last:
        steps.append((_BLOCK, "atb", last))
    return steps


def _pairs(attribution: Maps) -> list[Tensor]:
    """Per sequence ``[N, T]``: True at the pairs that count."""
    mask = attribution.mask
    keys = mask if attribution.key_mask is None else attribution.key_mask
    queries = torch.tensor(list(attribution.queries), dtype=torch.long, device=mask.device)
    allowed = torch.ones(len(queries), keys.shape[1], dtype=torch.bool, device=mask.device)
    if attribution.arguments.get("causal"):
        allowed = torch.arange(keys.shape[1], device=mask.device) <= queries[:, None]
    return [row[queries][:, None] & key[None, :] & allowed for row, key in zip(mask, keys, strict=True)]
