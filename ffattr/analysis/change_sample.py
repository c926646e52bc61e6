"""The change of the maps from a stated sample of their pairs, while they stream by.

Shapes: ``n`` query tokens and ``t`` key tokens in a block of rows, ``p`` pairs in a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import names_missing_extra
from .change import BOUNDS, COLUMNS, average_defined, bound_mean
from .ranks import center_ranks, correlate, standard_error
from .rows import Block, find_components, split_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["ChangeSample"]


class ChangeSample:
    """Measures `contextualization_change` without keeping the maps, on random pairs of each layer and sequence.

        sample = ChangeSample()
        ffattr.attribute(model, inputs, scopes="all", keep=ffattr.Reduce(sample))
        frame = sample.contextualization_change()

    ``pairs`` pairs of a query and a key are drawn for each sequence, all equally likely, and the same ones in every
    scope and layer; where there are no more than that, all of them. Which ones depends on ``seed`` alone, not on how
    rows are cut into blocks. Memory: twice ``pairs`` numbers for each scope, layer and sequence.

    keys: for each sequence a number from 0 to 2**63 - 1 by which its pairs are drawn, instead of its place among the
        others: a document's own then, whichever others are computed beside it.
    causal: whether only keys that are not after the query count. None: where no row reaches such a key; that
        takes keys and queries to be the same tokens, so say False of maps whose columns are groups of tokens.

    One sample is for one call of `ffattr.attribute` and one stack of layers.

    >>> sample = ffattr.analysis.ChangeSample(pairs=20)
    >>> text = "The cat sat on the mat."
    >>> attr = ffattr.attribute(model, text, tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(sample))
    >>> attr.maps, len(sample.contextualization_change())  # three layers, four components
    ({}, 12)
    """

    def __init__(
        self, pairs: int = 20_000, seed: int = 0, causal: bool | None = None, keys: Sequence[int] | None = None
    ) -> None:
        if not isinstance(pairs, int) or pairs < 2:
            raise ValueError(f"ChangeSample(pairs={pairs!r}), expected an integer of at least 2")
        wrong = next((key for key in keys or () if not 0 <= key < 2**63), None)
        if wrong is not None:
            raise ValueError(f"ChangeSample(keys=...) has {wrong!r}, expected numbers from 0 to 2**63 - 1")
        self.pairs, self.seed, self.causal, self.keys = pairs, seed, causal, keys
        self._steps: list[tuple[str, str, str]] = []
        self._drawn: dict[int, dict[int, tuple[_Drawn, _Drawn]]] = {}  # keys up to the query, and after it
        self._offers: dict[int, _Offer] = {}  # by sequence, of the last block that may come again from the next layer
        self._ahead = False  # whether anything comes from after the query

    def __call__(self, rows: Block) -> None:
        """Takes the next block of rows. Raises ValueError for scopes without a component and for rows that were here
        before."""
        self._steps = find_components(list(rows.maps))
        scopes = self._list_scopes()
        drawn = self._drawn.setdefault(rows.layer, {})
        both = drawn.setdefault(rows.batch, (_Drawn(self.pairs, len(scopes)), _Drawn(self.pairs, len(scopes))))
        for queries, keys, tiles in split_rows(rows, scopes):
            offer = self._offer_pairs(rows.batch, queries, keys, both)
            self._ahead = self._ahead or bool(((tiles[0] != 0) & offer.after).any())
            flat = torch.stack(tiles).flatten(1)
            for part, pairs in zip(both, offer.pairs, strict=True):
                if not part.add_pairs(pairs, flat):
                    raise ValueError(
                        f"layer {rows.layer} of sequence {rows.batch} came twice: use a new ChangeSample for every "
                        "call of attribute and for every stack of layers, and name each layer once"
                    )

    @names_missing_extra
    def contextualization_change(self, per: Literal["layer", "sequence"] = "layer") -> pandas.DataFrame:
        """Returns the frame of `contextualization_change` with two more columns.

        ``pairs`` is how many were compared, of all sequences together, and ``standard_error`` how far ``value`` is
        likely to be from that of all pairs of these sequences: 0 where it is of all. How far it may be from that of
        other sequences ``low`` and ``high`` tell. ``per="sequence"``: of each sequence one row, with ``batch`` after
        ``layer``, and without these two.

        >>> sample = ffattr.analysis.ChangeSample()  # 20 000 pairs: more than the 9 * 9 that there are
        >>> text = "The cat sat on the mat."
        >>> _ = ffattr.attribute(model, text, tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(sample))
        >>> sample.contextualization_change()[["pairs", "standard_error"]].drop_duplicates().values.tolist()
        [[81.0, 0.0]]
        """
        import pandas as pd

        if not self._drawn:
            raise ValueError("nothing was drawn yet: call attribute with keep=ffattr.Reduce(sample) first")
        if per not in ("layer", "sequence"):
            raise ValueError(f"per={per!r}, expected 'layer' or 'sequence'")
        causal = not self._ahead if self.causal is None else self.causal
        rows = []
        for layer, drawn in self._drawn.items():
            samples = {batch: _merge_draws(past, future, causal) for batch, (past, future) in drawn.items()}
            groups = [samples] if per == "layer" else [{batch: samples[batch]} for batch in sorted(samples)]
            for together in groups:
                place = (layer,) if per == "layer" else (layer, *together)
                rows += [(*place, *row) for row in self._compare_samples(list(together.values()))]
        place_columns = COLUMNS[:1] if per == "layer" else [*COLUMNS[:1], "batch"]
        found = pd.DataFrame(rows, columns=[*place_columns, *COLUMNS[1:], *BOUNDS, "pairs", "standard_error"])
        return found if per == "layer" else found.drop(columns=BOUNDS)

    def _compare_samples(self, samples: Sequence[tuple[Tensor, int]]) -> Iterator[tuple[Any, ...]]:
        """Yields for each component what the frame says of it after ``layer``, of these sequences together."""
        scopes, pairs = self._list_scopes(), sum(values.shape[1] for values, _ in samples)
        ranks = [center_ranks(values) for values, _ in samples]
        for component, before, after in self._steps:
            first, second = scopes.index(before), scopes.index(after)
            changes = [1 - correlate(of_scopes[first], of_scopes[second]) for of_scopes in ranks]
            changes = [0.0 if change < 0 else change for change in changes]  # as rounding would have it
            sides = [(values[first], values[second], of) for values, of in samples]
            errors = [
                standard_error(a, b, of) for (a, b, of), c in zip(sides, changes, strict=True) if not math.isnan(c)
            ]
            error = math.hypot(*errors) / len(errors) if errors else math.nan
            yield component, before, after, average_defined(changes), *bound_mean(changes), pairs, error

    def _offer_pairs(self, batch: int, queries: Tensor, keys: Tensor, both: Sequence[_Drawn]) -> _Offer:
        """Returns the pairs of a block in the order of their lots. Layers mostly have the same blocks: those of which
        all pairs count are drawn once for all."""
        found = self._offers.get(batch)
        if found is None or not (torch.equal(found.queries, queries) and torch.equal(found.keys, keys)):
            lots, after = _draw_lots(self.seed, self._key_of(batch), queries, keys), keys > queries[:, None]
            pairs = [part.select_pairs(lots, offered) for part, offered in zip(both, (~after, after), strict=True)]
            found = _Offer(queries, keys, after, pairs)
            if lots.numel() <= self.pairs:
                self._offers[batch] = found
        return found

    def _key_of(self, batch: int) -> int:
        if self.keys is None:
            return batch
        if batch >= len(self.keys):
            raise ValueError(f"sequence {batch} came, but ChangeSample(keys=...) has {len(self.keys)}")
        return self.keys[batch]

    def _list_scopes(self) -> list[str]:
        return list(dict.fromkeys(scope for _, *both in self._steps for scope in both))


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a block that may be drawn, of ``offered``: their ``lots`` ``[p]``, which rise, and their places
    ``at`` ``[p]`` in the block ``[n, t]``, flat."""

    lots: Tensor
    at: Tensor
    offered: int


@dataclass(frozen=True)
class _Offer:
    """What a block of these queries and keys offers: pairs with no key after the query, and the others."""

    queries: Tensor
    keys: Tensor
    after: Tensor
    pairs: Sequence[_Pairs]


class _Drawn:
    """Keeps of the pairs offered the ``size`` with the lowest lots: ``values`` ``[scopes, size]`` in their order."""

    def __init__(self, size: int, scopes: int) -> None:
        self.size, self.offered = size, 0
        self.lots = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(scopes, 0)
        self._limit = torch.iinfo(torch.int64).max

    def select_pairs(self, lots: Tensor, offered: Tensor) -> _Pairs:
        """Returns which pairs of a block ``[n, t]`` may be drawn where ``offered`` is True: those with lower lots than
        the pairs that are kept, and of a large block no more than are kept."""
        at = (offered & (lots < self._limit)).flatten().nonzero()[:, 0]
        found = lots.flatten()[at]
        lowest = found.topk(self.size, largest=False).indices if len(at) > self.size else found.argsort()
        return _Pairs(found[lowest].cpu(), at[lowest], int(offered.sum()))

    def add_pairs(self, pairs: _Pairs, tiles: Tensor) -> bool:
        """Takes pairs of a block ``tiles`` ``[scopes, n * t]``. Returns False if they came before."""
        self.offered += pairs.offered
        if len(pairs.lots) == 0:
            return True
        values, merged = tiles[:, pairs.at].cpu(), pairs.lots
        if len(self.lots):
            merged, order = torch.cat([self.lots, pairs.lots]).sort()
            values = torch.cat([self.values.to(values.dtype), values], 1)[:, order[: self.size]]
        self.lots, self.values = merged[: self.size], values
        if len(self.lots) == self.size:
            self._limit = int(self.lots[-1])
        return not bool((merged[1:] == merged[:-1]).any())


def _merge_draws(past: _Drawn, future: _Drawn, causal: bool) -> tuple[Tensor, int]:
    """Returns ``[scopes, p]`` values of the pairs that count, and of how many they are a sample."""
    if causal:
        return past.values, past.offered
    dtype = torch.promote_types(past.values.dtype, future.values.dtype)
    values, offered = torch.cat([past.values.to(dtype), future.values.to(dtype)], 1), past.offered + future.offered
    if values.shape[1] > past.size:
        values = values[:, torch.cat([past.lots, future.lots]).topk(past.size, largest=False).indices]
    return values, offered


def _draw_lots(seed: int, key: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns a random number of 63 bits for every pair, ``[n, t]``, which depends on nothing else."""
    base = _mix_bits(_mix_bits(torch.tensor(seed % 2**63, device=keys.device)) + key)
    rows, columns = _mix_bits(base ^ queries), _mix_bits(_mix_bits(base + 1) ^ keys)
    return _mix_bits(rows[:, None] ^ columns) & (2**63 - 1)


def _mix_bits(bits: Tensor) -> Tensor:
    """Makes every bit depend on all 64 of ``bits``: SplitMix64 (Steele et al. 2014), a one-to-one map."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))
