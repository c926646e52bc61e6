"""Does the feed-forward network undo what bypasses it, or is it diluted by it? The angle between the two, of each pair.

The vector behind the residual connection is the sum of the network's own, ``a``, and of what bypasses the network,
``b``, so that three norms tell their angle: ``cos = (|a + b| ** 2 - |a| ** 2 - |b| ** 2) / (2 |a| |b|)``. Where it is
negative the network takes away of what a token brought; where it is about zero and ``|a| / |b|`` small, what it does is
lost in what bypasses it. `contextualization_change` cannot tell these two.

Shapes: ``n`` query tokens and ``t`` key tokens in a block of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import names_missing_extra
from .rows import Block, NamedMaps, check_one_stack, find_bypass, iterate_rows, split_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["Alignment", "alignment", "list_angles"]

_BINS = 4000
"""Of cosines from -1 to 1: a median is told to half a thousandth."""


def alignment(attribution: NamedMaps, per: Literal["layer", "sequence"] = "layer") -> pandas.DataFrame:
    """Returns the cosine of the network's vector and of what bypasses it, for a token's own and for other pairs.

    Two rows for each layer (``per="sequence"``: and sequence, ``batch``): ``pairs_of`` (``"own"``: of a token and
    itself, ``"others"``), ``pairs`` (how many), ``mean`` and ``median`` of the cosines (the latter to half a
    thousandth), ``negative``, the share of the pairs below zero, ``ratio``, the geometric mean of the network's norm
    over that of the bypass, and ``removed``, the mean of ``-cos * |a| / |b|``: which part of what bypasses the network
    it takes away along its own direction. Pairs where either has no length do not count. Norms in float32 tell a cosine
    to about ``1e-7 * |b| / |a|``.

    Raises ValueError where the maps of the network, of its bypass and of their sum were not kept whole, and for maps
    that are no Euclidean norms.

    >>> found = ffattr.analysis.alignment(attr)
    >>> found[found["layer"] == 0]["pairs_of"].tolist()
    ['own', 'others']
    >>> bool(found["median"].between(-1, 1).all())
    True
    """
    return _collect_angles(attribution).frame(per)


def list_angles(attribution: NamedMaps) -> list[tuple[int, str, float, float]]:
    """Returns layer, ``"own"`` or ``"others"``, median and share below zero of `alignment`, which raises as this does.

    >>> from ffattr.analysis.alignment import list_angles
    >>> [angle[:2] for angle in list_angles(attr)][:2]
    [(0, 'own'), (0, 'others')]
    """
    return [(row[0], row[1], row[4], row[5]) for row in _collect_angles(attribution).list_rows("layer")]


def _collect_angles(attribution: NamedMaps) -> Alignment:
    """Takes all rows of the maps. Raises ValueError where they do not tell an angle."""
    check_one_stack(attribution)
    if attribution.arguments.get("reduce", "l2") != "l2":
        raise ValueError(
            f"these maps are reduce={attribution.arguments['reduce']!r}, expected Euclidean norms, 'l2': only they "
            "tell an angle"
        )
    collector = Alignment()
    for rows in iterate_rows(attribution, find_bypass(attribution.scopes), "Alignment"):
        collector(rows)
    return collector


class Alignment:
    """Collects the frame of `alignment` without keeping the maps:

        angles = Alignment()
        ffattr.attribute(model, inputs, scopes="all", keep=ffattr.Reduce(angles))
        frame = angles.frame()

    Maps whose columns are not the tokens of their rows know no own: all of their pairs are ``"others"``, if ``groups``
    says so. Memory: a few thousand numbers for each layer and sequence.

    >>> angles = ffattr.analysis.Alignment()
    >>> _ = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(angles))
    >>> angles.frame()["pairs"].tolist()[:2]
    [6, 30]
    """

    def __init__(self, groups: bool = False) -> None:
        self.groups = groups
        self._found: dict[tuple[int, int], tuple[_Sums, _Sums]] = {}  # by layer and sequence: of own, of other pairs

    def __call__(self, rows: Block) -> None:
        """Takes the next block of rows. Raises ValueError for scopes without the three that it takes."""
        scopes = find_bypass(list(rows.maps))
        both = self._found.setdefault((rows.layer, rows.batch), (_Sums(), _Sums()))
        for queries, keys, tiles in split_rows(rows, scopes):
            bypass, ff, total = (tile.double() for tile in tiles)
            own = queries[:, None] == keys if not self.groups else torch.zeros_like(ff, dtype=torch.bool)
            counted = (bypass > 0) & (ff > 0)
            for sums, some in zip(both, (own & counted, ~own & counted), strict=True):
                sums.add_pairs(bypass[some], ff[some], total[some])

    @names_missing_extra
    def frame(self, per: Literal["layer", "sequence"] = "layer") -> pandas.DataFrame:
        """Returns the frame of `alignment`. Raises ValueError where nothing came yet.

        >>> angles = ffattr.analysis.Alignment()
        >>> texts = ["The cat sat.", "Dogs barking."]
        >>> _ = ffattr.attribute(model, texts, tokenizer=tokenizer, scopes="all", keep=ffattr.Reduce(angles))
        >>> angles.frame("sequence")["batch"].tolist()[:4]
        [0, 0, 1, 1]
        """
        import pandas as pd

        places = ["layer"] if per == "layer" else ["layer", "batch"]
        columns = [*places, "pairs_of", "pairs", "mean", "median", "negative", "ratio", "removed"]
        return pd.DataFrame(self.list_rows(per), columns=columns)

    def list_rows(self, per: str) -> list[tuple[Any, ...]]:
        """Returns the rows of `frame`, which raises as this does."""
        if not self._found:
            raise ValueError("no rows came yet: call attribute with keep=ffattr.Reduce(alignment) first")
        if per not in ("layer", "sequence"):
            raise ValueError(f"per={per!r}, expected 'layer' or 'sequence'")
        groups: dict[tuple[int, ...], list[tuple[_Sums, _Sums]]] = {}
        for (layer, batch), both in self._found.items():
            groups.setdefault((layer,) if per == "layer" else (layer, batch), []).append(both)
        rows = [
            (*place, name, *_Sums.join([both[which] for both in groups[place]]).describe())
            for place in sorted(groups)
            for which, name in enumerate(("own", "others"))
        ]
        return [row for row in rows if row[2 if per == "layer" else 3]]


class _Sums:
    """Holds what is known of some pairs: how many cosines are in each of the bins, and sums over the pairs."""

    def __init__(self) -> None:
        self.bins = torch.zeros(_BINS, dtype=torch.int64)
        self.sums = torch.zeros(4, dtype=torch.float64)  # cosines, negative ones, logarithms of ratios, what is removed

    def add_pairs(self, bypass: Tensor, ff: Tensor, total: Tensor) -> None:
        """Takes the norms ``[p]`` of some pairs."""
        cosine = ((total**2 - ff**2 - bypass**2) / (2 * ff * bypass)).clamp(-1, 1)
        at = ((cosine + 1) / 2 * _BINS).long().clamp(0, _BINS - 1)
        self.bins += torch.bincount(at, minlength=_BINS).cpu()
        ratio = ff / bypass
        parts = (cosine, (cosine < 0).double(), ratio.log(), -cosine * ratio)
        self.sums += torch.stack([part.sum() for part in parts]).cpu()

    @classmethod
    def join(cls, some: Sequence[_Sums]) -> _Sums:
        found = cls()
        for one in some:
            found.bins += one.bins
            found.sums += one.sums
        return found

    def describe(self) -> tuple[int, float, float, float, float, float]:
        """Returns how many pairs there are, and mean, median, share below zero, ratio and what is removed."""
        pairs = int(self.bins.sum())
        if not pairs:
            return 0, math.nan, math.nan, math.nan, math.nan, math.nan
        cosine, negative, logarithm, removed = (self.sums / pairs).tolist()
        reached = self.bins.cumsum(0)
        middle = int((reached >= pairs / 2).nonzero()[0, 0])
        after = int((reached > pairs / 2).nonzero()[0, 0])
        median = (middle + after + 1) / _BINS - 1
        return pairs, cosine, median, negative, math.exp(logarithm), removed
