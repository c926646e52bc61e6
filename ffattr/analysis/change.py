"""How much the parts of the feed-forward block rearrange the maps, after Kobayashi et al. 2024; which pairs count is
our definition.

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import names_missing_extra
from .ranks import spearman
from .rows import NamedMaps, check_one_stack, find_components, key_mask, mark_real_pairs, row_shares
from .words import Words

if TYPE_CHECKING:
    import pandas

__all__ = [
    "BOUNDS",
    "COLUMNS",
    "average_defined",
    "bound_mean",
    "contextualization_change",
    "list_changes",
    "measure_change",
]

COLUMNS = ["layer", "component", "before", "after", "value"]
BOUNDS = ["low", "high"]

_DRAWS = 2000
_MANY = 2000  # sequences, whose mean is as good as normal
_SURE = 0.95


@names_missing_extra
def contextualization_change(
    attribution: NamedMaps, *, zeros: bool = False, special: bool = True, own: bool = True, shares: bool = False
) -> pandas.DataFrame:
    """Measures how much each component between two neighbouring scopes rearranges the map: ``1 - Spearman rho``.

    One row per layer and component: ``layer``, ``component`` (``FF``, ``RES``, ``LN`` or the whole ``FF block``),
    ``before``, ``after`` (the two scopes), ``value``, the mean over the sequences, and ``low`` and ``high``, between
    which it lies for 95 % of draws of as many of these sequences (bootstrap; NaN of a single one). Only pairs of real
    tokens count, and in a causal model (``arguments["causal"]``) only those where the key is not after the query: the
    structural zeros would agree by themselves.

    These are choices, which move the figures: ``zeros`` counts the structural zeros of a causal model,
    ``special=False`` leaves out pairs with a special token, ``own=False`` those of a token and itself, and ``shares``
    ranks shares of rows instead of norms.

    Raises ValueError where no whole maps were kept; see `ChangeSample`.

    >>> frame = ffattr.analysis.contextualization_change(attr)
    >>> frame.loc[:3, ["layer", "component", "before", "after"]].values.tolist()  # and "value"
    [[0, 'FF', 'atb', 'atb_ff'], [0, 'RES', 'atb_ff', 'atb_ff_res'],
     [0, 'LN', 'atb_ff_res', 'atb_ff_res_ln'], [0, 'FF block', 'atb', 'atb_ff_res_ln']]
    """
    import pandas as pd

    return pd.DataFrame(list_changes(attribution, zeros, special, own, shares), columns=[*COLUMNS, *BOUNDS])


def list_changes(
    attribution: NamedMaps, zeros: bool = False, special: bool = True, own: bool = True, shares: bool = False
) -> list[tuple[int, str, str, str, float, float, float]]:
    """Returns the rows of `contextualization_change`, which takes the same arguments."""
    check_one_stack(attribution)
    found = find_components(attribution.scopes)
    pairs = _mark_chosen_pairs(attribution, zeros, special, own)
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
            first, second = (attribution.maps[scope][place] for scope in (before, after))
            if shares:
                first, second = row_shares(first), row_shares(second)
            changes = [measure_change(a[p], b[p]) for a, b, p in zip(first, second, pairs, strict=True)]
            low, high = bound_mean(changes)
            rows.append((layer, component, before, after, average_defined(changes), low, high))
    return rows


def _mark_chosen_pairs(attribution: NamedMaps, zeros: bool, special: bool, own: bool) -> list[Tensor]:
    """Returns ``[N, T]`` per sequence, True at the pairs that count. Raises ValueError where columns are not the tokens
    of rows, whose own or special ones nobody knows."""
    causal = bool(attribution.arguments.get("causal")) and not zeros
    keys = key_mask(attribution)
    pairs = mark_real_pairs(attribution.mask, keys, attribution.queries, causal)
    if special and own:
        return pairs
    if attribution.key_mask is not None:
        raise ValueError(
            "the columns of these maps are not the tokens of their rows: leave special and own as they are"
        )
    queries = torch.tensor(list(attribution.queries), dtype=torch.long)
    for batch, some in enumerate(pairs):
        if not own:
            some &= (torch.arange(keys.shape[1]) != queries[:, None]).to(some.device)
        if not special:
            apart = torch.tensor(Words.from_tokens(attribution.tokens[batch], None).special, dtype=torch.bool)
            some &= ~(apart[queries][:, None] | apart).to(some.device)
    return pairs


def measure_change(before: Tensor, after: Tensor) -> float:
    """Returns ``1 - rho`` of two maps; never less than 0, as rounding would have it."""
    change = 1 - spearman(before, after)
    return 0.0 if change < 0 else change


def bound_mean(changes: Sequence[float]) -> tuple[float, float]:
    """Returns between which values the mean over sequences lies in 95 % of draws of as many of them, with repetition.

    The draws are the same ones each time. Of thousands of sequences the normal distribution tells as much. NaN of fewer
    than two.
    """
    values = torch.tensor([change for change in changes if not math.isnan(change)], dtype=torch.float64)
    count = len(values)
    if count < 2:
        return math.nan, math.nan
    if count > _MANY:
        reach = 1.959964 * float(values.std()) / math.sqrt(count)
        return float(values.mean()) - reach, float(values.mean()) + reach
    drawn = torch.randint(count, (_DRAWS, count), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([(1 - _SURE) / 2, (1 + _SURE) / 2], dtype=torch.float64)
    low, high = values[drawn].mean(1).quantile(ends).tolist()
    return low, high


def average_defined(changes: Sequence[float]) -> float:
    """Returns the mean over the sequences where a change is defined; NaN where there is none."""
    return float(torch.tensor(changes, dtype=torch.float64).nanmean())
