"""What the feed-forward block changes in the maps (Kobayashi et al. 2024, section 5).

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas

__all__ = ["Block", "ChangeSample", "Maps", "contextualization_change", "spearman"]

_COMPONENTS = {"ff": "FF", "res": "RES", "ln": "LN"}
_BLOCK = "FF block"
_COLUMNS = ["layer", "component", "before", "after", "value"]

_AT_ONCE = 2**20  # pairs for which lots are drawn together


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


class Block(Protocol):
    """What `ChangeSample` reads of an `ffattr.Rows`."""

    @property
    def layer(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def queries(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def maps(self) -> Mapping[str, Tensor]: ...


def contextualization_change(attribution: Maps) -> pandas.DataFrame:
    """How much each component between two neighbouring scopes rearranges the map: ``1 - Spearman rho``.

    One row per layer and component: ``layer``, ``component`` (``FF``, ``RES``, ``LN`` or the whole ``FF block``),
    ``before``, ``after`` (the two scopes) and ``value``, the mean over the sequences. Only pairs of real tokens count,
    and in a causal model (``arguments["causal"]``) only those where the key is not after the query: the structural
    zeros would agree by themselves. Raises ValueError where no whole maps were kept; see `ChangeSample`.
    """
    import pandas as pd

    steps = _steps(attribution.scopes)
    pairs = _pairs(attribution)
    shape = (len(pairs), *pairs[0].shape) if pairs else (0,)
    for scope in {scope for _, *both in steps for scope in both}:
        if scope not in attribution.maps or (pairs and attribution.maps[scope].shape[1:] != shape):
            raise ValueError(
                f"no whole maps of {scope} were kept: compute it with keep='dense', or with "
                "keep=ffattr.Reduce(sample) of an ffattr.analysis.ChangeSample, which keeps a sample of the pairs"
            )
    rows = []
    for place, layer in enumerate(attribution.layers):
        for component, before, after in steps:
            first, second = attribution.maps[before][place], attribution.maps[after][place]
            changes = [1 - spearman(a[p], b[p]) for a, b, p in zip(first, second, pairs, strict=True)]
            rows.append((layer, component, before, after, _mean(changes)))
    return pd.DataFrame(rows, columns=_COLUMNS)


class ChangeSample:
    """`contextualization_change` without keeping the maps: of random pairs of each layer and sequence.

        sample = ChangeSample()
        ffattr.attribute(model, inputs, scopes="all", keep=ffattr.Reduce(sample))
        frame = sample.contextualization_change()

    ``pairs`` pairs of a query and a key are drawn for each sequence, all equally likely, and the same ones in every
    scope and layer; where there are no more than that, all of them. Which ones depends on ``seed`` alone, not on how
    rows are cut into blocks. Memory: twice ``pairs`` numbers for each scope, layer and sequence.

    causal: whether only keys that are not after the query count. None: where no row reaches such a key; that
        takes keys and queries to be the same tokens, so say False of maps whose columns are groups of tokens.

    One sample is for one call of `ffattr.attribute` and one stack of layers.
    """

    def __init__(self, pairs: int = 20_000, seed: int = 0, causal: bool | None = None) -> None:
        if not isinstance(pairs, int) or pairs < 2:
            raise ValueError(f"ChangeSample(pairs={pairs!r}), expected an integer of at least 2")
        self.pairs, self.seed, self.causal = pairs, seed, causal
        self._steps: list[tuple[str, str, str]] = []
        self._drawn: dict[int, dict[int, tuple[_Drawn, _Drawn]]] = {}  # keys up to the query, and after it
        self._ahead = False  # whether anything comes from after the query

    def __call__(self, rows: Block) -> None:
        """Takes the next block of rows. Raises ValueError for scopes without a component and for rows that were here
        before."""
        self._steps = _steps(list(rows.maps))
        scopes = self._scopes()
        maps = [rows.maps[scope] for scope in scopes]
        device = maps[0].device
        queries, keys = rows.queries.to(device), rows.keys.to(device)
        drawn = self._drawn.setdefault(rows.layer, {})
        both = drawn.setdefault(rows.batch, (_Drawn(self.pairs, len(scopes)), _Drawn(self.pairs, len(scopes))))
        step = max(1, _AT_ONCE // max(1, len(keys)))
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            after = keys > queries[some, None]
            lots = _lots(self.seed, rows.batch, queries[some], keys)
            tiles = [tile[some] for tile in maps]
            self._ahead = self._ahead or bool(((tiles[0] != 0) & after).any())
            for part, offered in zip(both, (~after, after), strict=True):
                if not part.offer(lots, offered, tiles):
                    raise ValueError(
                        f"layer {rows.layer} of sequence {rows.batch} came twice: use a new ChangeSample for every "
                        "call of attribute and for every stack of layers, and name each layer once"
                    )

    def contextualization_change(self) -> pandas.DataFrame:
        """The frame of `contextualization_change` with two more columns.

        ``pairs`` is how many were compared, of all sequences together, and ``standard_error`` how far ``value`` is
        likely to be from that of all pairs: 0 where it is of all.
        """
        import pandas as pd

        if not self._drawn:
            raise ValueError("nothing was drawn yet: call attribute with keep=ffattr.Reduce(sample) first")
        causal = not self._ahead if self.causal is None else self.causal
        scopes, rows = self._scopes(), []
        for layer, drawn in self._drawn.items():
            samples = [_sample(past, future, causal) for past, future in drawn.values()]
            pairs = sum(values.shape[1] for values, _ in samples)
            for component, before, after in self._steps:
                sides = [(v[scopes.index(before)], v[scopes.index(after)], of) for v, of in samples]
                changes = [1 - spearman(a, b) for a, b, _ in sides]
                errors = [_error(a, b, of) for (a, b, of), c in zip(sides, changes, strict=True) if not math.isnan(c)]
                error = math.hypot(*errors) / len(errors) if errors else math.nan
                rows.append((layer, component, before, after, _mean(changes), pairs, error))
        return pd.DataFrame(rows, columns=[*_COLUMNS, "pairs", "standard_error"])

    def _scopes(self) -> list[str]:
        return list(dict.fromkeys(scope for _, *both in self._steps for scope in both))


class _Drawn:
    """Of all pairs offered, the ``size`` with the lowest lots: ``values`` ``[scopes, size]`` in the lots' order."""

    def __init__(self, size: int, scopes: int) -> None:
        self.size, self.offered = size, 0
        self.lots = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(scopes, 0)
        self._limit = torch.iinfo(torch.int64).max

    def offer(self, lots: Tensor, offered: Tensor, tiles: Sequence[Tensor]) -> bool:
        """Pairs of a block ``[n, t]``: those where ``offered`` is True. False if they were offered before."""
        self.offered += int(offered.sum())
        at = (offered & (lots < self._limit)).nonzero(as_tuple=True)
        if len(at[0]) > self.size:
            lowest = lots[at].topk(self.size, largest=False, sorted=False).indices
            at = (at[0][lowest], at[1][lowest])
        if len(at[0]) == 0:
            return True
        merged, order = torch.cat([self.lots, lots[at].cpu()]).sort()
        self.lots, order = merged[: self.size], order[: self.size]
        values = torch.stack([tile[at] for tile in tiles]).cpu()
        self.values = torch.cat([self.values.to(values.dtype), values], 1)[:, order]
        if len(self.lots) == self.size:
            self._limit = int(self.lots[-1])
        return not bool((merged[1:] == merged[:-1]).any())


def _sample(past: _Drawn, future: _Drawn, causal: bool) -> tuple[Tensor, int]:
    """Values ``[scopes, p]`` of the pairs that count, in random order, and of how many pairs they are a sample."""
    if causal:
        return past.values, past.offered
    order = torch.cat([past.lots, future.lots]).argsort()[: past.size]
    dtype = torch.promote_types(past.values.dtype, future.values.dtype)
    return torch.cat([past.values.to(dtype), future.values.to(dtype)], 1)[:, order], past.offered + future.offered


def _error(a: Tensor, b: Tensor, of: int) -> float:
    """Standard error of the rank correlation of a random sample of ``of`` pairs, by the delta method.

    The correlation is ``C / sqrt(A B)`` of means over products of ranks. One more pair changes them by its own product
    and by the ranks of all others, on the side that it comes in below.
    """
    f, g = ((_ranks(side) - 0.5) / len(side) - 0.5 for side in (a, b))
    variance_a, variance_b, covariance = (f * f).mean(), (g * g).mean(), (f * g).mean()
    by_covariance = f * g + _above(a, g) + _above(b, f)
    by_variances = (f * f + 2 * _above(a, f)) / variance_a + (g * g + 2 * _above(b, g)) / variance_b
    change = (by_covariance - covariance * by_variances / 2) / (variance_a * variance_b).sqrt()
    return float(change.std(correction=0)) / math.sqrt(len(a)) * math.sqrt(1 - len(a) / of)


def _above(values: Tensor, weights: Tensor) -> Tensor:
    """For each of ``values``, the sum of ``weights`` of the larger ones, and half of those of its equals, per value."""
    found, place = torch.unique(values, sorted=True, return_inverse=True)
    sums = weights.new_zeros(len(found)).index_add_(0, place, weights)
    return ((sums.sum() - sums.cumsum(0) + sums / 2) / len(values))[place]


def _lots(seed: int, batch: int, queries: Tensor, keys: Tensor) -> Tensor:
    """A random number ``[n, t]`` of 63 bits for every pair, which depends on nothing else."""
    base = _mixed(_mixed(torch.tensor(seed % 2**63, device=keys.device)) + batch)
    rows, columns = _mixed(base ^ queries), _mixed(_mixed(base + 1) ^ keys)
    return _mixed(rows[:, None] ^ columns) & (2**63 - 1)


def _mixed(bits: Tensor) -> Tensor:
    """Every bit of the result depends on all 64 of ``bits``: SplitMix64 (Steele et al. 2014), a one-to-one map."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))


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
    """``(component, scope before, scope after)``. A scope's name is its predecessor's plus the component added.

    Raises ValueError where there is none.
    """
    steps = []
    for scope in scopes:
        before, _, part = scope.rpartition("_")
        if part in _COMPONENTS and before.startswith("atb") and before in scopes:
            steps.append((_COMPONENTS[part], before, scope))
    whole = [scope for scope in scopes if scope.startswith("atb") and scope.endswith(("_ln_ff_res", "_ff_res_ln"))]
    last = max(whole, key=len, default="")  # of a pre-LN or of a post-LN layer
    if "atb" in scopes and last:
        steps.append((_BLOCK, "atb", last))
    if not steps:
        raise ValueError(
            f"no two neighbouring scopes of the feed-forward block among {', '.join(scopes)}: compute the "
            "maps with scopes='all' (or name the scopes around the component)"
        )
    return steps


def _mean(changes: Sequence[float]) -> float:
    """Over the sequences where it is defined."""
    return float(torch.tensor(changes, dtype=torch.float64).nanmean())


def _pairs(attribution: Maps) -> list[Tensor]:
    """Per sequence ``[N, T]``: True at the pairs that count."""
    mask = attribution.mask
    keys = mask if attribution.key_mask is None else attribution.key_mask
    queries = torch.tensor(list(attribution.queries), dtype=torch.long, device=mask.device)
    allowed = torch.ones(len(queries), keys.shape[1], dtype=torch.bool, device=mask.device)
    if attribution.arguments.get("causal"):
        allowed = torch.arange(keys.shape[1], device=mask.device) <= queries[:, None]
    return [row[queries][:, None] & key[None, :] & allowed for row, key in zip(mask, keys, strict=True)]
