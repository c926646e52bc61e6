"""What every token takes from the others and gives to them.

Shapes: ``n`` query tokens and ``t`` key tokens in a block of rows, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import names_missing_extra
from ..selection import scope_named
from .rows import Block, NamedMaps, check_one_stack, check_same_run, iterate_rows, read_names, row_shares, split_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["TokenSummary", "token_summary"]

_COLUMNS = ["layer", "batch", "position", "token", "norm", "own", "takes", "gives", "gives_mean"]


def token_summary(attribution: NamedMaps, scope: str = "layer") -> pandas.DataFrame:
    """Returns one row per layer, sequence and real token: what it takes and gives in the maps ``M`` of one scope.

    With the shares ``p[i, j] = M[i, j] / sum_k M[i, k]``, in which a row of zeros has none, the columns after
    ``layer``, ``batch``, ``position`` and ``token`` are of token ``t``

        norm        sum_j M[t, j]              all that its row is made of
        own         p[t, t]                    its own share of it
        takes       sum_j p[t, j], j != t      what comes from the others: 1 - own, or 0 in a row of zeros
        gives       sum_i p[i, t], i != t      its share of the other tokens' rows, of which the queries are counted
        gives_mean  gives / how many these are; in a causal model those after it. NaN where there are none

    ``norm``, ``own`` and ``takes`` are NaN for tokens that are no query. ``scope="layer"`` is the last scope. Raises
    KeyError for one that was not computed, ValueError for maps by head or expert, for maps whose columns are not the
    tokens of their rows, and where whole maps were not kept; `TokenSummary` needs none.

    >>> found = ffattr.analysis.token_summary(attr)
    >>> found.query("layer == 2 and batch == 1")["token"].tolist()
    ['[CLS]', 'Dog', '##s', 'bark', '##ing', '.', '[SEP]']
    >>> bool(((found["own"] + found["takes"]).round(6) == 1).all())
    True
    """
    check_one_stack(attribution)
    name = scope_named(scope, attribution.scopes)
    if name in attribution.maps:
        _check_summed(name, attribution.maps[name].dim() - 2)  # [L, B, N, T]
    collector = TokenSummary(name)
    for rows in iterate_rows(attribution, [name], "TokenSummary"):
        collector(rows)
    return collector.frame(attribution)


class TokenSummary:
    """Collects the frame of `token_summary` without keeping the maps:

        summary = TokenSummary()
        attr = ffattr.attribute(model, inputs, tokenizer=tokenizer, keep=ffattr.Reduce(summary))
        frame = summary.frame(attr)

    Memory: four numbers for each token of each layer. One summary is for one call of `ffattr.attribute` and one stack
    of layers.

    >>> summary = ffattr.analysis.TokenSummary("attn")
    >>> words = tokenizer(["the cat sat"], return_tensors="pt")
    >>> found = ffattr.attribute(model, words, tokenizer=tokenizer, scopes="attn", keep=ffattr.Reduce(summary))
    >>> list(summary.frame(found).columns[4:])
    ['norm', 'own', 'takes', 'gives', 'gives_mean']
    """

    def __init__(self, scope: str = "layer") -> None:
        self.scope = scope
        self._sums: dict[tuple[int, int], Tensor] = {}  # by layer and sequence: norm, own, takes, gives [4, T]

    def __call__(self, rows: Block) -> None:
        """Takes the next block of rows. Raises KeyError for a scope that is not there, ValueError for maps by head or
        expert and for rows that were here before."""
        scope = scope_named(self.scope, list(rows.maps))
        _check_summed(scope, rows.maps[scope].dim())
        at = (rows.layer, rows.batch)
        for queries, keys, (tile,) in split_rows(rows, [scope]):
            shares = row_shares(tile)
            diagonal = queries[:, None] == keys
            own = (shares * diagonal).sum(-1)
            others = shares * ~diagonal
            of_rows = torch.stack([tile.double().sum(-1), own, others.sum(-1)]).cpu()
            rows_at, keys_at = queries.cpu(), keys.cpu()
            sums = (
                self._make_room(at, 1 + int(torch.cat([rows_at, keys_at]).max()))
                if len(keys)
                else self._make_room(at, 0)
            )
            if not sums[0, rows_at].isnan().all():
                raise ValueError(
                    f"layer {rows.layer} of sequence {rows.batch} came twice: use a new TokenSummary for every call of "
                    "attribute and for every stack of layers, and name each layer once"
                )
            sums[:3, rows_at] = of_rows
            sums[3].index_add_(0, keys_at, others.sum(0).cpu())

    @names_missing_extra
    def frame(self, attribution: NamedMaps) -> pandas.DataFrame:
        """Returns the frame of `token_summary`; ``attribution`` is what `ffattr.attribute` returned of this run.

        Raises ValueError where nothing came yet, where it is of other layers or tokens, and for maps whose columns are
        not the tokens of their rows.

        >>> summary = ffattr.analysis.TokenSummary()
        >>> found = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=ffattr.Reduce(summary))
        >>> summary.frame(found).query("layer == 0")["token"].tolist()
        ['[CLS]', 'The', 'cat', 'sat', '.', '[SEP]']
        """
        import numpy as np
        import pandas as pd

        if not self._sums:
            raise ValueError("no rows came yet: call attribute with keep=ffattr.Reduce(summary) first")
        if attribution.key_mask is not None:
            raise ValueError(
                "the columns of these maps are not the tokens of their rows: no token gives and takes both"
            )
        sequences, most = max(batch for _, batch in self._sums) + 1, max(sums.shape[1] for sums in self._sums.values())
        check_same_run(attribution, {layer for layer, _ in self._sums}, sequences, most)
        tokens, called = attribution.mask.shape[1], read_names(attribution)
        mask, causal = attribution.mask.cpu(), bool(attribution.arguments.get("causal"))
        seen_by = [_count_viewers(real, attribution.queries, causal) for real in mask]
        found: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for layer in dict.fromkeys(attribution.layers):
            for batch, real in enumerate(mask):
                if (layer, batch) not in self._sums:
                    continue  # no query among its tokens
                places = real.nonzero()[:, 0]
                norm, own, takes, gives = self._make_room((layer, batch), tokens)[:, places]
                names = called[batch] if called else [str(at) for at in range(tokens)]
                by = seen_by[batch][places]
                columns = [
                    np.full(len(places), layer),
                    np.full(len(places), batch),
                    places.numpy(),
                    np.array([*(names[at] for at in places.tolist()), ""], dtype=object)[:-1],
                    *(values.numpy() for values in (norm, own, takes, gives, gives / by)),
                ]
                for name, column in zip(_COLUMNS, columns, strict=True):
                    found[name].append(column)
        return pd.DataFrame({name: np.concatenate(columns) for name, columns in found.items()})

    def _make_room(self, at: tuple[int, int], tokens: int) -> Tensor:
        """Returns the sums ``[4, T]`` of a layer and sequence, with room for at least so many tokens."""
        sums = self._sums.get(at, torch.empty(4, 0, dtype=torch.float64))
        missing = tokens - sums.shape[1]
        if missing > 0:
            new = torch.full((4, missing), torch.nan, dtype=torch.float64)
            new[3] = 0
            sums = torch.cat([sums, new], 1)
        self._sums[at] = sums
        return sums


def _count_viewers(real: Tensor, queries: Sequence[int], causal: bool) -> Tensor:
    """Counts the queries that could see each token, itself left out: ``[T]``."""
    asked = torch.zeros_like(real, dtype=torch.float64)
    asked[torch.tensor(list(queries), dtype=torch.int64)] = 1
    asked *= real
    return asked.flip(0).cumsum(0).flip(0) - asked if causal else asked.sum() - asked


def _check_summed(scope: str, axes: int) -> None:
    if axes != 2:
        raise ValueError(f"the maps of {scope} are told apart by head or expert: summarise another scope")
