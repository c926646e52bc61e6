"""How much more often pairs fall into a category than pairs do by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import names_missing_extra
from .amplification import BY_MARKS, AmplifiedPairs
from .categories import Categories, categorize_pairs, read_kinds
from .rows import AT_ONCE, NamedMaps, check_one_stack, check_same_run

if TYPE_CHECKING:
    import pandas

__all__ = ["category_rates", "count_all_pairs", "tabulate_rates"]


def category_rates(
    pairs: pandas.DataFrame | AmplifiedPairs, attribution: NamedMaps, categories: Categories = BY_MARKS
) -> pandas.DataFrame:
    """Counts how often the pairs of each layer are in each category, beside how often all pairs are.

    ``pairs`` is a frame with ``layer``, ``batch``, ``query`` and ``key``, as `amplified_pairs` gives it, or what
    collected it; ``attribution`` what `ffattr.attribute` returned of the same run, of which only the tokens are read.
    Pairs of a token and itself are left out on both sides.

    One row per layer and category: ``layer``, ``category``, ``pairs`` (how many there are of the layer), ``count``
    (those in the category), ``share`` = count / pairs, ``all_pairs`` and ``all_count`` (the same of all pairs of real
    tokens, in a causal model those with no key after the query), ``base_rate`` = all_count / all_pairs, ``lift`` =
    share / base_rate (NaN where that is 0) and ``p_value``: how likely it is that so many or more are in the category
    when as many pairs are drawn from all of them at random (hypergeometric). Raises ValueError for pairs of another run
    and where `Categories` do not fit.

    >>> top = ffattr.analysis.amplified_pairs(attr, k=10)
    >>> found = ffattr.analysis.category_rates(top, attr)
    >>> found.query("layer == 0 and category == 'subwords'")[["pairs", "all_count"]].values.tolist()
    [[10, 4]]
    """
    check_one_stack(attribution)
    frame = pairs.frame(attribution, None) if isinstance(pairs, AmplifiedPairs) else pairs
    if not {"layer", "batch", "query", "key"} <= set(getattr(frame, "columns", ())):
        raise TypeError(
            f"pairs is a {type(pairs).__name__}, expected a frame with layer, batch, query and key, as amplified_pairs "
            "gives it, or an AmplifiedPairs"
        )
    frame = frame[frame["query"] != frame["key"]]
    if len(frame):
        tokens = int(frame[["query", "key"]].max().max()) + 1
        check_same_run(attribution, set(frame["layer"].tolist()), int(frame["batch"].max()) + 1, tokens)
    found = categorize_pairs(frame, attribution, categories)
    total, counts = 0, dict.fromkeys(categories.names, 0)
    for pairs_of_sequence, of_sequence in count_all_pairs(attribution, categories).values():
        total += pairs_of_sequence
        counts = {name: count + of_sequence[name] for name, count in counts.items()}
    drawn = {}
    for layer in frame["layer"].unique().tolist():
        here = (frame["layer"] == layer).to_numpy()
        drawn[layer] = int(here.sum()), {name: int(found[name][here].sum()) for name in categories.names}
    return tabulate_rates(drawn, total, counts)


@names_missing_extra
def tabulate_rates(
    drawn: Mapping[int, tuple[int, Mapping[str, int]]], total: int, counts: Mapping[str, int]
) -> pandas.DataFrame:
    """Returns the frame of `category_rates` from its counts: by layer how many pairs there are and how many of them are
    in each category, and the same of all pairs."""
    import pandas as pd

    rows = []
    for layer, (pairs, in_category) in drawn.items():
        for name, everywhere in counts.items():
            count = in_category[name]
            share, base = count / pairs, everywhere / total
            lift = share / base if base else math.nan
            chance = _chance_of_at_least(count, pairs, everywhere, total)
            rows.append((layer, name, pairs, count, share, total, everywhere, base, lift, chance))
    columns = ["layer", "category", "pairs", "count", "share", "all_pairs", "all_count", "base_rate", "lift", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def count_all_pairs(attribution: NamedMaps, categories: Categories) -> dict[int, tuple[int, dict[str, int]]]:
    """Counts by sequence the pairs of two tokens, and those of them in each category."""
    queries, mask = torch.tensor(list(attribution.queries), dtype=torch.int64), attribution.mask.cpu()
    found = {}
    for batch, kinds in read_kinds(attribution, categories).items():
        total, counts = 0, dict.fromkeys(categories.names, 0)
        rows, keys = queries[mask[batch][queries]], mask[batch].nonzero()[:, 0]
        for some in rows.split(max(1, AT_ONCE // max(1, len(keys)))):
            allowed = some[:, None] != keys
            if attribution.arguments.get("causal"):
                allowed &= some[:, None] > keys
            total += int(allowed.sum())
            for name, holds in kinds(some[:, None], keys).items():
                counts[name] += int((holds & allowed).sum())
        found[batch] = total, counts
    return found


def _chance_of_at_least(count: int, drawn: int, marked: int, of: int) -> float:
    """Returns the chance of ``count`` or more marked ones among ``drawn`` of ``of``, of which ``marked`` are."""
    first, last = max(count, drawn - (of - marked)), min(drawn, marked)
    if first <= max(0, drawn - (of - marked)):
        return 1.0
    number = torch.arange(first, last + 1, dtype=torch.float64)
    others = drawn - number
    ways = _log_falling(drawn, number) - (number + 1).lgamma()
    chances = ways + _log_falling(marked, number) + _log_falling(of - marked, others)
    chances = chances - _log_falling(of, torch.tensor(float(drawn), dtype=torch.float64))
    return min(1.0, float(chances.exp().sum()))


def _log_falling(n: int, k: torch.Tensor) -> torch.Tensor:
    """Returns ``log(n (n - 1) ... (n - k + 1))``: factorials of large numbers, which would leave few digits of their
    difference, by Stirling's series, in which what is common to both cancels."""
    top, rest = torch.tensor(float(n), dtype=torch.float64), n - k
    series = k * top.log() - (rest + 0.5) * (-k / top).log1p() - k + 1 / (12 * top) - 1 / (12 * rest)
    return torch.where(rest > 1e5, series, (top + 1).lgamma() - (rest + 1).lgamma())
