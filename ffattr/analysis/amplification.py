"""FF-amp: how much the feed-forward network amplifies what one token brings to another (after Kobayashi et al. 2024).

As we define it: the map after the network minus the map before it, each with rows that sum to one. Shapes: ``L``
layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens, ``n`` and ``t`` of them in a block of rows, ``p`` pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import names_missing_extra
from ..selection import layer_place, sequence
from .categories import Categories, categorize_pairs
from .rows import (
    Block,
    NamedMaps,
    check_one_stack,
    check_same_run,
    find_scopes_around_ff,
    iterate_rows,
    key_mask,
    mark_counted_pairs,
    read_names,
    row_shares,
    split_rows,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["BY_MARKS", "AmplifiedPairs", "amplified_pairs", "ff_amp", "ff_amp_maps"]

BY_MARKS = Categories()


def ff_amp_maps(attribution: NamedMaps) -> Tensor:
    """Returns FF-amp of every pair, ``[L, B, N, T]`` in float64, 0 at padding: what a query's row gains.

        amplification[i, j] = after[i, j] / sum_k after[i, k] - before[i, j] / sum_k before[i, k]

    A row sums to 0. A row of zeros has shares of 0. Raises ValueError where the scopes around the network were not
    computed or not kept whole.

    >>> found = ffattr.analysis.ff_amp_maps(attr)
    >>> found.shape, found.sum(-1).abs().max() < 1e-12
    (torch.Size([3, 2, 9, 9]), tensor(True))
    """
    scopes = _check_ff_scopes(attribution)
    sizes = (len(attribution.layers), len(attribution.mask), len(attribution.queries), key_mask(attribution).shape[1])
    found = torch.zeros(sizes, dtype=torch.float64)
    for rows in iterate_rows(attribution, scopes, "AmplifiedPairs"):
        places = rows.rows.cpu()
        for queries, keys_at, tiles in split_rows(rows, scopes):
            at, places = places[: len(queries)], places[len(queries) :]
            before, after = map(row_shares, tiles)
            found[rows.place, rows.batch, at[:, None], keys_at.cpu()] = (after - before).cpu()
    return found


@names_missing_extra
def ff_amp(attribution: NamedMaps, layer: int | None = None, batch: int | None = None) -> pandas.DataFrame:
    """Returns one row for each pair of real tokens: what `ff_amp_maps` says of it, and of what.

    Columns ``layer``, ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token``, ``before``, ``after``
    (shares of the query's row) and ``amplification``, their difference. In a causal model (``arguments["causal"]``) no
    pairs with the key after the query. ``layer`` is the model's number of one layer, or negative: counted from the last
    computed one; ``batch`` one sequence. Raises IndexError where there is no such layer or sequence; see `ff_amp_maps`.

    >>> found = ffattr.analysis.ff_amp(attr, layer=1, batch=0)
    >>> found.nlargest(1, "amplification")[["query_token", "key_token"]].shape
    (1, 2)
    """
    import pandas as pd

    scopes = _check_ff_scopes(attribution)
    layers = None if layer is None else [layer_place(layer, attribution.layers)]
    batches = None if batch is None else [sequence(batch, len(attribution.mask))]
    allowed = [pairs.cpu() for pairs in mark_counted_pairs(attribution)]
    frames = []
    for rows in iterate_rows(attribution, scopes, "AmplifiedPairs", layers, batches):
        before, after = (row_shares(rows.maps[scope]).cpu() for scope in scopes)
        queries, keys = rows.queries.cpu(), rows.keys.cpu()
        row, column = allowed[rows.batch][rows.rows.cpu()][:, keys].nonzero(as_tuple=True)
        values = torch.stack([side[row, column] for side in (before, after, after - before)])
        places = torch.stack([torch.full_like(row, rows.batch), queries[row], keys[column]])
        frames.append(_build_frame([rows.layer] * len(row), places, values, attribution))
    return pd.concat(frames, ignore_index=True)


def amplified_pairs(
    attribution: NamedMaps,
    k: int = 50,
    per: Literal["layer", "sequence"] = "layer",
    self_pairs: bool = False,
    categories: Categories | None = BY_MARKS,
) -> pandas.DataFrame:
    """Returns the ``k`` pairs of tokens of every layer that its feed-forward network amplifies most, those first.

    The columns of `ff_amp`, ``rank`` (from 1, within the layer or sequence) and one for each of ``categories``
    (None: none), True where the pair falls into it. Arguments as of `AmplifiedPairs`, which does the same without maps.

    >>> found = ffattr.analysis.amplified_pairs(attr, k=5)
    >>> len(found), list(found.columns[:4])
    (15, ['layer', 'rank', 'batch', 'query'])
    """
    collector = AmplifiedPairs(k, per, self_pairs)
    for rows in iterate_rows(attribution, _check_ff_scopes(attribution), "AmplifiedPairs"):
        collector(rows)
    return collector.frame(attribution, categories)


class AmplifiedPairs:
    """Collects the frame of `amplified_pairs` without keeping the maps:

        pairs = AmplifiedPairs(k=50)
        attr = ffattr.attribute(model, inputs, tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(pairs))
        frame = pairs.frame(attr)

    k: how many are kept, ``per`` ``"layer"`` of all sequences together, or per ``"sequence"`` and layer. Of equally
        amplified ones those that come first, by sequence, query and key. Pairs with no share before and none after are
        no candidates: a key after the query, say.
    self_pairs: whether a token's share of its own row is a candidate. Maps whose columns are not the tokens of their
        rows (groups, an encoder's tokens) know no own: say True for them.

    Memory: six numbers for each pair kept. One collector is for one call of `ffattr.attribute` and one stack of layers.

    >>> pairs = ffattr.analysis.AmplifiedPairs(k=4)
    >>> words = tokenizer(["the cat sat", "two dogs"], padding=True, return_tensors="pt")
    >>> found = ffattr.attribute(model, words, tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(pairs))
    >>> frame = pairs.frame(found)
    >>> frame.groupby("layer").size().tolist(), bool((frame["query"] != frame["key"]).all())
    ([4, 4, 4], True)
    """

    def __init__(self, k: int = 50, per: Literal["layer", "sequence"] = "layer", self_pairs: bool = False) -> None:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k={k!r}, expected an integer of at least 1")
        if per not in ("layer", "sequence"):
            raise ValueError(f"per={per!r}, expected 'layer' or 'sequence'")
        self.k, self.per, self.self_pairs = k, per, self_pairs
        self._best: dict[int, dict[int, _Best]] = {}  # by layer, then by sequence (0: of all)

    def __call__(self, rows: Block) -> None:
        """Takes the next block of rows. Raises ValueError for scopes without the two around the network, and for rows
        that were here before."""
        best = self._best.setdefault(rows.layer, {}).setdefault(rows.batch if self.per == "sequence" else 0, _Best())
        for queries, keys, tiles in split_rows(rows, find_scopes_around_ff(list(rows.maps))):
            before, after = map(row_shares, tiles)
            offered = (before > 0) | (after > 0)
            if not self.self_pairs:
                offered &= queries[:, None] != keys
            if not best.add_pairs(self.k, rows.batch, queries, keys, before, after, offered):
                raise ValueError(
                    f"layer {rows.layer} of sequence {rows.batch} came twice: use a new AmplifiedPairs for every call "
                    "of attribute and for every stack of layers, and name each layer once"
                )

    def frame(self, attribution: NamedMaps, categories: Categories | None = BY_MARKS) -> pandas.DataFrame:
        """Returns the frame of `amplified_pairs`; ``attribution`` is what `ffattr.attribute` returned of this run.

        Raises ValueError where nothing came yet, where it is of other layers or tokens, and for self pairs or
        categories of maps whose columns are not the tokens of their rows.

        >>> pairs = ffattr.analysis.AmplifiedPairs(k=2, per="sequence")
        >>> found = ffattr.attribute(model, ["The cat sat.", "Dogs bark!"], tokenizer=tokenizer, layers=1,
        ...                          scopes=["atb", "atb_ff"], keep=ffattr.Reduce(pairs))
        >>> pairs.frame(found)[["layer", "rank", "batch"]].values.tolist()
        [[1, 1, 0], [1, 2, 0], [1, 1, 1], [1, 2, 1]]
        """
        if not self._best:
            raise ValueError("no rows came yet: call attribute with keep=ffattr.Reduce(pairs) first")
        places = torch.cat([best.places for of in self._best.values() for best in of.values()], 1)
        if places.shape[1]:
            sequences, tokens = int(places[0].max()) + 1, int(places[1].max()) + 1
            check_same_run(attribution, self._best, sequences, tokens)
        if attribution.key_mask is not None and not self.self_pairs:
            raise ValueError(
                "the columns of these maps are not the tokens of their rows, so that no pair is a token's own: say "
                "self_pairs=True (and categories=None)"
            )
        kept = [
            (layer, best)
            for layer in dict.fromkeys(attribution.layers)
            for _, best in sorted(self._best.get(layer, {}).items())
        ]
        counts = [best.values.shape[1] for _, best in kept]
        layers = [layer for (layer, _), count in zip(kept, counts, strict=True) for _ in range(count)]
        places, values = (torch.cat(parts, 1) for parts in zip(*((b.places, b.values) for _, b in kept), strict=True))
        found = _build_frame(layers, places, values, attribution)
        found.insert(1, "rank", [rank for count in counts for rank in range(1, count + 1)])
        if categories is not None:
            for name, column in categorize_pairs(found, attribution, categories).items():
                found[name] = column
        return found


class _Best:
    """Holds the most amplified of the pairs offered: ``places`` ``[3, p]`` (sequence, query, key) and ``values``
    ``[3, p]`` (before, after, amplification), which fall."""

    def __init__(self) -> None:
        self.places = torch.empty(3, 0, dtype=torch.int64)
        self.values = torch.empty(3, 0, dtype=torch.float64)

    def add_pairs(
        self, k: int, batch: int, queries: Tensor, keys: Tensor, before: Tensor, after: Tensor, offered: Tensor
    ) -> bool:
        """Takes the pairs of a block ``[n, t]`` where ``offered`` is True. Returns False if they came before."""
        change = after - before
        if self.values.shape[1] == k:
            offered = offered & (change >= self.values[2, -1].item())
        candidates = change[offered]
        if len(candidates) > k:
            offered = offered & (change >= candidates.topk(k).values[-1])  # equals of the last one too
        row, column = offered.nonzero(as_tuple=True)
        places = torch.stack([torch.full_like(row, batch), queries[row], keys[column]]).cpu()
        values = torch.stack([side[row, column] for side in (before, after, change)]).cpu()
        self.places, self.values = torch.cat([self.places, places], 1), torch.cat([self.values, values], 1)
        for part in (2, 1, 0):  # the last sort counts most
            self._select_pairs(self.places[part].sort(stable=True).indices)
        again = bool((self.places[:, 1:] == self.places[:, :-1]).all(0).any())
        self._select_pairs(self.values[2].sort(descending=True, stable=True).indices[:k])
        return not again

    def _select_pairs(self, order: Tensor) -> None:
        """Keeps the pairs at the places ``order`` ``[p]``, in that order."""
        self.places, self.values = self.places[:, order], self.values[:, order]


def _check_ff_scopes(attribution: NamedMaps) -> list[str]:
    """Returns the two scopes around the feed-forward network. Raises TypeError for several stacks of layers."""
    check_one_stack(attribution)
    return find_scopes_around_ff(attribution.scopes)


def _build_frame(layers: Sequence[int], places: Tensor, values: Tensor, attribution: NamedMaps) -> pandas.DataFrame:
    """Names the pairs at ``places`` ``[3, p]`` (sequence, query, key) of ``layers`` ``[p]``, with ``values`` ``[3, p]``
    beside them."""
    import numpy as np
    import pandas as pd

    batch, query, key = places.tolist()
    names = read_names(attribution)
    key_names = names if attribution.key_tokens is None else attribution.key_tokens

    def name_tokens(
        of: Sequence[Sequence[str]], positions: Iterable[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
        found = [of[b][at] if of else str(at) for b, at in zip(batch, positions, strict=True)]
        return np.array([*found, ""], dtype=object)[:-1]  # with "" also none at all are objects

    columns = {"batch": batch, "query": query, "key": key}
    integers = {name: np.array(column, dtype=np.int64) for name, column in columns.items()}
    before, after, change = values.numpy()
    return pd.DataFrame(
        {
            "layer": np.array(layers, dtype=np.int64),
            **integers,
            "query_token": name_tokens(names, query),
            "key_token": name_tokens(key_names, key),
            "before": before,
            "after": after,
            "amplification": change,
        }
    )
