"""`Attribution`: what `ffattr.attribute` returns, how it is saved, and its views.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``H`` heads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..selection import list_names
from . import serialise, tables
from .contents import Contents, describe_check, number_expert
from .files import write, write_text
from .scope_names import extra_axis

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure

    from ..report import Panel

__all__ = ["Attribution"]


@dataclass(eq=False, repr=False)
class Attribution(Contents):
    """Maps of how much of each token reaches each token, per scope and layer.

    ``maps[scope]`` ``[L, B, N, T]`` (``attn_heads``: ``[L, B, H, N, T]``) is the norm of the part of query token
    ``queries[n]``'s vector that comes from key token ``t``; 0 where either is padding or masked.
    ``bias[scope]`` ``[L, B, N]`` is the norm of what comes from no token. ``reduce`` says which norm: ``"l2"`` or
    ``"l1"``; or, with ``"alti"``, that entries are parts of their row's sum of what takes a norm's place.

    ``tokens[b][t]`` is what the tokenizer calls a token (padding included); pictures, tables and pages have ``names``,
    which are the same in the case of the text. ``layers`` and ``queries`` say which of the model's layers and tokens
    the first and the last-but-one axis stand for, ``mask`` ``[B, T]`` is True at real tokens, ``error`` ``[L, B]`` is
    the relative difference between the recomputed and the model's own layer output. ``plan`` prints as what ran,
    ``arguments`` holds how it was asked for.

    Keys are the same tokens as queries, but for attention from a decoder to an encoder: ``key_tokens`` and ``key_mask``
    are then those of the encoder. Where ``keys`` or ``groups`` were asked for, they are those of the columns, and
    ``groups`` ``[B, T]`` is the column of each token (-1: none).

    In a mixture of ``k`` experts for each token, ``experts`` ``[L, B, N, k]`` says which ones (-1: none) and ``shares``
    what their outputs were multiplied by; per-expert maps, ``[L, B, k, N, T]``, are in this order. A shared expert,
    that all tokens go through, is the last of them, with the number -2.

    What `attribute` was told to keep of the maps (``keep=``) decides what there is: with `ffattr.TopK` ``maps`` is
    empty and ``largest[scope]`` holds the largest entries of every row; with `ffattr.Pool` ``maps`` are those of blocks
    of ``block`` tokens; with `ffattr.Reduce` there are no maps, and ``reduced`` lists what the function returned.
    These four are read from ``kept``, which a policy leaves, and is what knows how to read, name and save them.
    ``sketch_error[scope]`` ``[L, B]`` is there with ``method=ffattr.Sketch(...)``: the median relative error of the
    map's entries as pairs computed exactly tell it; 0 where the sketch would have saved nothing and was left out.

    >>> attr
    Attribution(3 layers, 2 x 9 tokens, 9 queries, scopes: attn_heads, attn, ..., atb_ff_res_ln)
    >>> attr["atb"].shape, attr["attn_heads"].shape  # [layers, batch, (head,) query, key]
    (torch.Size([3, 2, 9, 9]), torch.Size([3, 2, 2, 9, 9]))
    >>> attr.scope("layer")  # the last one's name
    'atb_ff_res_ln'
    >>> attr.tokens[0][3], attr.tokens[0][2], bool(attr["layer"][-1, 0, 3, 2] > 0)  # what "sat" has of "cat"
    ('sat', 'cat', True)
    """

    def __repr__(self) -> str:
        sequences, tokens = self.mask.shape
        reduced = "" if self.reduce == "l2" else f"; reduce={self.reduce!r}"
        left_out = f"; {len(self.skipped)} inputs skipped" if self.skipped else ""
        columns = "" if self.key_mask is None else f", {self.key_mask.shape[1]} columns"
        sizes = f"{len(self.layers)} layers, {sequences} x {tokens} tokens, {len(self.queries)} queries{columns}"
        return (
            f"Attribution({sizes}, "
            f"scopes: {', '.join(self.scopes)}{self.kept.describe()}{reduced}{left_out}"
            f"{describe_check(self.arguments)})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `ffattr.load` reads: whole or not at all, never over half of an old one.

        Raises ValueError where there are no maps (keep=Reduce).

        >>> attr.save("maps.safetensors")
        >>> torch.equal(ffattr.load("maps.safetensors")["atb"], attr["atb"])
        True
        """
        serialise.check_saved(self)
        write(path, *serialise.to_parts(self))

    def to_pandas(self, scopes: str | Sequence[str] | None = None) -> pandas.DataFrame:
        """Lists one row per scope, layer, sequence, query token and key token (real tokens only): its norm, or what
        ``reduce`` has put in its place.

        Columns ``scope``, ``layer``, ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token``,
        ``norm``, and where a scope is per-head or per-expert, ``head`` or ``expert`` (missing elsewhere).
        With keep=TopK only the kept pairs; with keep=Pool one row per pair of blocks, ``norm`` its mean, with the
        position of the first token of a block and the text of its first and last.

        >>> frame = attr.to_pandas("atb")
        >>> frame.loc[8, ["query_token", "key_token"]].tolist()  # and "norm"
        ['[CLS]', '[SEP]']
        >>> len(frame)  # 3 layers, 9 and 7 tokens
        390
        """
        return tables.make_frame(self, self._resolve_scopes(scopes))

    def to_xarray(self, scopes: str | Sequence[str] | None = None) -> xarray.Dataset:
        """Makes an `xarray.Dataset` with named dimensions: ``layer``, ``batch``, (``head``,) ``query``, ``key``.

        One variable per scope, and ``<scope>_bias`` without keys. Coordinates are the model's numbers of layers, the
        positions of tokens, their texts ``query_token`` and ``key_token``, and ``query_real`` and ``key_real``, False
        at padding. With keep=Pool rows and columns are blocks, named by their first token; with keep=TopK there are no
        maps, and this is a ValueError.

        >>> data = attr.to_xarray("layer")
        >>> data["atb_ff_res_ln"].sel(layer=2, query=3).dims
        ('batch', 'key')
        >>> data.query_token.values[0, :3].tolist()
        ['[CLS]', 'The', 'cat']
        """
        return tables.make_dataset(self, self._resolve_scopes(scopes))

    def top(self, k: int = 10, scope: str = "layer", *, own: bool = False) -> pandas.DataFrame:
        """Lists the ``k`` strongest pairs of every layer and sequence, strongest first.

        Columns ``layer``, ``batch``, ``rank`` from 1, ``query``, ``key``, ``query_token``, ``key_token``, ``norm`` and
        ``share``, the norm's part of the sum of its row; of per-head or per-expert scopes, ``head`` or ``expert``. What
        a token keeps of itself, mostly the strongest by far, counts only with ``own``.

        >>> attr.top(2)[["layer", "batch", "rank"]].head(4).values.tolist()
        [[0, 0, 1], [0, 0, 2], [1, 0, 1], [1, 0, 2]]
        """
        return tables.rank_pairs(self, k, self.scope(scope), own)

    def compare(
        self, other: Attribution, scopes: str | Sequence[str | tuple[str, str]] | None = None
    ) -> pandas.DataFrame:
        """Says how alike the maps of two attributions of the same tokens are: a row per scope, layer and sequence.

        ``scopes`` are names, or pairs of a scope of this one and a scope of the other; None: all that both have.
        Layers of the same number belong together; where there are none, as many layers in their order.

        Columns ``scope``, ``other_scope``, ``layer``, ``other_layer``, ``batch``, ``rho`` (Spearman's rank correlation
        of all pairs of real tokens, of causal models those with no key after the query), ``difference``
        (``|A - B| / |A|``, Frobenius), ``largest`` (the largest ``|A - B|`` of a pair) and ``overlap``, how many of the
        ten strongest pairs of different tokens are the same. Raises ValueError where tokens, rows or columns differ.

        >>> same = attr.compare(attr, "layer")
        >>> same[["rho", "difference", "overlap"]].round(6).drop_duplicates().values.tolist()
        [[1.0, 0.0, 1.0]]
        >>> attr.compare(attr, [("atb", "layer")]).iloc[0][["scope", "other_scope"]].tolist()
        ['atb', 'atb_ff_res_ln']
        """
        from . import comparison

        if not isinstance(other, Attribution):
            raise TypeError(f"compare takes an Attribution, got a {type(other).__name__}")
        return comparison.compare_maps(self, other, self._pair_scopes(other, scopes))

    def _pair_scopes(
        self, other: Attribution, scopes: str | Sequence[str | tuple[str, str]] | None
    ) -> list[tuple[str, str]]:
        if scopes is None:
            return [(name, name) for name in self.scopes if name in other.scopes]
        pairs = [(name, name) if isinstance(name, str) else name for name in list_names("scopes", scopes)]
        for pair in pairs:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"scopes has {pair!r}, expected a name, or a pair of a scope of each attribution")
        return [(self.scope(mine), other.scope(theirs)) for mine, theirs in pairs]

    def to_words(
        self, *, keys: str = "sum", queries: str = "mean", words: Sequence[Sequence[int | None]] | None = None
    ) -> Attribution:
        """Merges maps between tokens to maps between words.

        The norms of a word's tokens are added up over its columns (``keys="sum"``; or ``"max"``) and averaged over its
        rows (``queries="mean"``; or ``"max"``, ``"first"``, ``"last"``). The sum is an upper bound of the norm of the
        word's summed vectors; `attribute` with ``groups="words"`` computes that norm itself, and this then merges the
        rows alone. Words are read off the marks of tokens (``##``, ``Ġ``, ``▁``); for tokens without marks give
        ``words``, for every sequence a number for each token, None at special ones. Per-expert scopes are
        left out. Raises ValueError where whole maps of all queries were not kept.

        >>> attr.to_words().tokens[1]
        ['[CLS]', 'Dogs', 'barking', '.', '[SEP]', '', '', '', '']
        """
        from .merge_words import merge_words

        return replace(self, **merge_words(self, keys, queries, words))

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        scopes: str | Sequence[str] | None = None,
        title: str | None = None,
        limit: int = 15_000_000,
    ) -> None:
        """Writes a page to look around in: one HTML file that needs no network, whole or not at all.

        Layers, scopes, heads and sequences to choose from, the difference of two scopes (what the feed-forward block
        added), values at the pointer, what a token reads and who reads it in the running text, and the
        contextualization change. Values are kept as exactly as ``limit`` bytes allow, and the page says how exactly.
        Tokens are shown as text, whatever is in them.

        Raises ValueError where no maps were kept or a page within ``limit`` cannot hold them, OSError where it cannot
        be written.

        >>> attr.to_html("maps.html", scopes=["atb", "layer"])
        """
        from . import pages

        write_text(path, pages.render_page(self, self._make_panels(self._resolve_scopes(scopes)), title, limit))

    def _make_panels(self, scopes: Sequence[str]) -> list[Panel]:
        from . import pages

        return pages.make_panels(self, scopes)

    def _repr_html_(self) -> str:
        from . import pages

        return pages.render_summary(self, repr(self))

    def _resolve_scopes(self, scopes: str | Sequence[str] | None) -> tuple[str, ...]:
        names = self.scopes if scopes is None else list_names("scopes", scopes)
        return tuple(self.scope(name) for name in names)

    def of_expert(self, number: int | str, scope: str | None = None) -> Tensor:
        """Returns what one expert carried, ``[L, B, N, T]``: zero for tokens that do not go to it.

        ``"shared"`` is the expert that all tokens go through, where a model has one. ``scope`` names one that is
        per-expert (None: the only one). Raises ValueError where there is none.

        >>> import transformers
        >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        >>> config = transformers.MixtralConfig(vocab_size=9, num_hidden_layers=1, num_local_experts=4, **small)
        >>> mixture = transformers.MixtralModel(config).eval()
        >>> attr = ffattr.attribute(mixture, torch.tensor([[3, 1, 4, 1, 5]]), scopes="atb_ln_ff_experts")
        >>> parts = [attr.of_expert(number) for number in range(4)]  # [layers, batch, query, key] each
        >>> torch.allclose(sum(parts), attr["atb_ln_ff_experts"].sum(2))
        True
        """
        by_expert = [name for name in self.scopes if extra_axis(name) == "expert"]
        name = scope if scope is not None else by_expert[0] if by_expert else None
        if self.experts is None or name not in by_expert:
            raise ValueError(
                f"scope {scope!r} is not told apart by expert; computed and told apart: "
                f"{', '.join(by_expert) or 'none'}. "
                'Ask attribute for scopes=["..._ff_experts"].'
            )
        chosen = (self.experts == number_expert(number)).movedim(-1, 2)[..., None]  # [L, B, k, N, 1]
        return (self.kept.whole_map(name) * chosen).sum(2)

    def plot(
        self,
        scope: str = "layer",
        layer: int = -1,
        batch: int = 0,
        *,
        head: int | None = None,
        expert: int | str | None = None,
        **options: Any,
    ) -> Figure:
        """Draws one map with matplotlib, real tokens only; with keep=TopK the kept entries, with Pool blocks.

        ``layer`` is the model's number of the layer, or negative: counted from the last computed one. ``head`` picks a
        head of ``attn_heads`` (None: a small map of each), ``expert`` one of a mixture or ``"shared"``. ``options`` go
        to `ffattr.plot.map_figure` (``scale="linear"``), of all heads to `ffattr.plot.layer_grid`. Cells that a causal
        model cannot see are grey.

        >>> figure = attr.plot("atb", layer=1, batch=1)
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['[CLS]', 'Dog', '##s', 'bark', '##ing', '.', '[SEP]']
        """
        from . import figures

        return figures.draw_map(self, self.scope(scope), layer, batch, head, expert, options)

    def plot_scopes(self, layer: int = -1, batch: int = 0, **options: Any) -> Figure:
        """Draws the maps of all scopes of one layer side by side, from attention to the layer's output, with what
        each is of and what lies between them. ``options`` go to `ffattr.plot.scope_strip`.

        >>> len(attr.plot_scopes(layer=1).axes) > len(attr.scopes) - 1
        True
        """
        from . import figures

        return figures.draw_scopes(self, layer, batch, options)

    def plot_amplification(self, batch: int = 0, **options: Any) -> Figure:
        """Draws what the feed-forward network of every layer adds to each row's shares, and what it takes.

        See `ffattr.analysis.ff_amp_maps`; ``options`` go to `ffattr.plot.amp_strip`.

        >>> attr.plot_amplification(batch=1).axes[0].get_title()
        'layer 0'
        """
        from . import figures

        return figures.draw_amplification(self, batch, options)

    def to_bertviz(self, scope: str = "layer", batch: int = 0) -> dict[str, Any]:
        """Returns what bertviz takes: ``bertviz.head_view(**attr.to_bertviz("attn_heads"))``, or ``model_view``.

        ``attention`` has one tensor ``[1, H, t, t]`` for each layer, ``H`` 1 where the scope is not told apart by head
        or expert; ``tokens`` the ``t`` that are not padding. bertviz draws numbers as opacity: each row is divided by
        its sum. Raises ValueError where rows and columns are not the same tokens.

        >>> given = attr.to_bertviz("attn_heads", batch=1)
        >>> given["tokens"]
        ['[CLS]', 'Dog', '##s', 'bark', '##ing', '.', '[SEP]']
        >>> len(given["attention"]), given["attention"][0].shape
        (3, torch.Size([1, 2, 7, 7]))
        """
        from . import figures

        return figures.list_for_bertviz(self, self.scope(scope), batch)

    def plot_arcs(
        self,
        query: int | str,
        scope: str = "layer",
        other: str | None = None,
        *,
        layer: int = -1,
        batch: int = 0,
        **options: Any,
    ) -> Figure:
        """Draws what one token reads, as arcs over the text; those of the scope ``other`` below it.

        ``query`` is its position (negative: from the end), or a word that is there once. ``options`` go to
        `ffattr.plot.arcs`. Raises IndexError for padding and for queries that were not computed, ValueError for a word
        that is not there once.

        >>> figure = attr.plot_arcs("sat", "layer", other="atb", layer=2)  # with the feed-forward block, and without
        >>> figure.axes[0].get_title()
        'what “sat” (3) reads in layer 2'
        """
        from . import figures

        below = None if other is None else self.scope(other)
        return figures.draw_arcs(self, query, self.scope(scope), below, layer, batch, options)
