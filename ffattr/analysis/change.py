"""How much the parts of the feed-forward block rearrange the maps (Kobayashi et al. 2024, section 5).

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .ranks import spearman
from .rows import Maps, check_one_stack, find_components, mark_counted_pairs

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "average_defined", "contextualization_change"]

COLUMNS = ["layer", "component", "before", "after", "value"]


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


def average_defined(changes: Sequence[float]) -> float:
    """Returns the mean over the sequences where a change is defined; NaN where there is none."""
    return float(torch.tensor(changes, dtype=torch.float64).nanmean())
