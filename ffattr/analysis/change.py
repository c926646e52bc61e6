"""How much the parts of the feed-forward block rearrange the maps (Kobayashi et al. 2024, section 5).

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .ranks import spearman
from .rows import Maps, check_one_stack, mark_counted_pairs

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "average_defined", "contextualization_change", "find_components"]

COLUMNS = ["layer", "component", "before", "after", "value"]
_COMPONENTS = {"ff": "FF", "res": "RES", "ln": "LN"}
_BLOCK = "FF block"


def contextualization_change(attribution: Maps) -> pandas.DataFrame:
    """Measures how much each component between two neighbouring scopes rearranges the map: ``1 - Spearman rho``.

    One row per layer and component: ``layer``, ``component`` (``FF``, ``RES``, ``LN`` or the whole ``FF block``),
    ``before``, ``after`` (the two scopes) and ``value``, the mean over the sequences. Only pairs of real tokens count,
    and in a causal model (``arguments["causal"]``) only those where the key is not after the query: the structural
    zeros would agree by themselves. Raises ValueError where no whole maps were kept; see `ChangeSample`.

    >>> frame = ffattr.analysis.contextualization_change(attr)
    >>> frame.loc[:3, ["layer", "component", "before", "after"]].values.tolist()  # and "value"
    [[0, 'FF', 'atb', 'atb_ff'], [0, 'RES', 'atb_ff', 'atb_ff_res'],
     [0, 'LN', 'atb_ff_res', 'atb_ff_res_ln'], [0, 'FF block', 'atb', 'atb_ff_res_ln']]
    """
    import pandas as pd

    check_one_stack(attribution)
    found = find_components(attribution.scopes)
    pairs = mark_counted_pairs(attribution)
    shape = (len(pairs), *pairs[0].shape) if pairs else (0,)
    for scope in {scope for _, *both in found for scope in both}:
        if scope not in attribution.maps or (pairs and attribution.maps[scope].shape[1:] != shape):
            raise ValueError(
                f"no whole maps of {scope} were kept: compute it with keep='dense', or with "
                "keep=ffattr.Reduce(sample) of an ffattr.analysis.ChangeSample, which keeps a sample of the pairs"
            )
    rows = []
    for place, layer in enumerate(attribution.layers):
        for component, before, after in found:
            first, second = attribution.maps[before][place], attribution.maps[after][place]
            changes = [1 - spearman(a[p], b[p]) for a, b, p in zip(first, second, pairs, strict=True)]
            rows.append((layer, component, before, after, average_defined(changes)))
    return pd.DataFrame(rows, columns=COLUMNS)


def find_components(scopes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Returns ``(component, scope before, scope after)``. A scope's name is its predecessor's plus the component added.

    A layer without norms between its scopes is told by ``attn`` next to ``atb``: without it there is no ``FF block``.
    Raises ValueError where there is none.
    """
    found = []
    for scope in scopes:
        before, _, part = scope.rpartition("_")
        if part in _COMPONENTS and before.startswith("atb") and before in scopes:
            found.append((_COMPONENTS[part], before, scope))
    ends = ["_ln_ff_res", "_ff_res_ln"]  # of a pre-LN and of a post-LN layer
    if "attn" in scopes and "attn_res" not in scopes:  # of one whose norms are within its blocks, as in OLMo 2
        ends.append("atb_ff_res")
    whole = [scope for scope in scopes if scope.startswith("atb") and scope.endswith(tuple(ends))]
    last = max(whole, key=len, default="")
    if "atb" in scopes and last:
        found.append((_BLOCK, "atb", last))
    if not found:
        raise ValueError(
            f"no two neighbouring scopes of the feed-forward block among {', '.join(scopes)}: compute the "
            "maps with scopes='all' (or name the scopes around the component)"
        )
    return found


def average_defined(changes: Sequence[float]) -> float:
    """Returns the mean over the sequences where a change is defined; NaN where there is none."""
    return float(torch.tensor(changes, dtype=torch.float64).nanmean())
