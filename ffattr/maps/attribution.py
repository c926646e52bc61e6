"""`Attribution`: what `ffattr.attribute` returns, how it is saved, and the views of it.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``H`` heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import FileFormatError, write
from .keep import Top
from .tables import Ticks, table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Attribution"]

_OPTIONAL = ("key_mask", "experts", "shares")  # tensors that not every attribution has
_OF_TOP = tuple(part.name for part in fields(Top))


@dataclass(eq=False, repr=False)
class Attribution:
    """Maps of how much of each token reaches each token, per scope and layer.

    ``maps[scope]`` ``[L, B, N, T]`` (``attn_heads``: ``[L, B, H, N, T]``) is the norm of the part of query token
    ``queries[n]``'s vector that comes from key token ``t``; 0 where either is padding or masked.
    ``bias[scope]`` ``[L, B, N]`` is the norm of what comes from no token.

    ``tokens[b][t]`` is the text of a token (padding included), ``layers`` and ``queries`` say which of the model's
    layers and tokens the first and the last-but-one axis stand for, ``mask`` ``[B, T]`` is True at real tokens,
    ``error`` ``[L, B]`` is the relative difference between the recomputed and the model's own layer output. ``plan``
    prints as what ran, ``arguments`` holds how it was asked for.

    Keys are the same tokens as queries, but for attention from a decoder to an encoder: ``key_tokens`` and ``key_mask``
    are then those of the encoder. Of a mixture of ``k`` experts for each token, ``experts`` ``[L, B, N, k]`` says which
    ones (-1: none) and ``shares`` what their outputs were multiplied by; maps that are told apart by expert,
    ``[L, B, k, N, T]``, are in this order.

    What `attribute` was told to keep of the maps (``keep=``) decides what there is: with `ffattr.TopK` ``maps`` is
    empty and ``top[scope]`` holds the largest entries of every row; with `ffattr.Pool` ``maps`` are those of blocks of
    ``block`` tokens; with `ffattr.Reduce` there are no maps, and ``reduced`` lists what the function returned.
    ``sketch_error[scope]`` ``[L, B]`` is there with ``method=ffattr.Sketch(...)``: the median relative error of the
    map's entries as pairs computed exactly tell it; 0 where the sketch would have saved nothing and was left out.
    """

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[str, ...]
    mask: Tensor
    error: Tensor
    plan: object = None
    arguments: dict[str, Any] = field(default_factory=dict)
    key_tokens: list[list[str]] | None = None
    key_mask: Tensor | None = None
    experts: Tensor | None = None
    shares: Tensor | None = None
    top: dict[str, Top] = field(default_factory=dict)
    reduced: list[Any] = field(default_factory=list)
    block: int | None = None
    sketch_error: dict[str, Tensor] = field(default_factory=dict)

    def scope(self, name: str) -> str:
        """The name of a computed scope: ``"layer"`` stands for the last one. Raises `KeyError` listing the others."""
        if name == "layer":
            return self.scopes[-1]
        if name not in self.scopes:
            raise KeyError(f"no scope {name!r} here; computed: {', '.join(self.scopes)} (and the alias 'layer')")
        return name

    def __getitem__(self, scope: str) -> Tensor:
        """``attr["atb_ff"]``, or ``attr["layer"]`` for the last scope.

        Raises KeyError for a scope that was not computed, ValueError for one whose maps were not kept.
        """
        return self._map(self.scope(scope))

    def _map(self, scope: str) -> Tensor:
        if scope in self.maps:
            return self.maps[scope]
        if scope in self.top:
            raise ValueError(
                f"of {scope} only the largest entries of each row were kept (keep=TopK): they are in "
                f"attr.top[{scope!r}], whose dense(tokens) fills them into a map. For all entries compute it with "
                "keep='dense'"
            )
        raise ValueError(
            f"no map of {scope} was kept (keep=Reduce): attr.reduced lists what the function returned. For maps "
            "compute it with keep='dense'"
        )

    def __repr__(self) -> str:
        sequences, tokens = self.mask.shape
        return (
            f"Attribution({len(self.layers)} layers, {sequences} x {tokens} tokens, {len(self.queries)} queries, "
            f"scopes: {', '.join(self.scopes)}{self._kept()})"
        )

    def _kept(self) -> str:
        if self.block is not None:
            return f"; in blocks of {self.block} tokens"
        if self.top:
            return f"; the {next(iter(self.top.values())).values.shape[-1]} largest entries of each row"
        return "" if self.maps else f"; no maps kept, {len(self.reduced)} values reduced"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `ffattr.load` reads: whole or not at all, never over half of an old one.

        Raises ValueError where there are no maps (keep=Reduce).
        """
        self._check_kept()
        write(path, *self._parts())

    def _check_kept(self) -> None:
        for scope in self.scopes:
            if scope not in self.maps and scope not in self.top:
                raise ValueError(
                    f"nothing to save of {scope}: keep=Reduce keeps no maps. Save what the function returned, "
                    "attr.reduced, yourself, or compute with keep='dense', TopK or Pool"
                )

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and what else there is as JSON takes it."""
        tensors = {"mask": self.mask, "error": self.error}
        for scope in self.scopes:
            if scope in self.top:
                tensors |= {f"top.{scope}.{part}": getattr(self.top[scope], part) for part in _OF_TOP}
            elif scope in self.maps:
                tensors[f"maps.{scope}"] = self.maps[scope]
            tensors[f"bias.{scope}"] = self.bias[scope]
            if scope in self.sketch_error:
                tensors[f"sketch_error.{scope}"] = self.sketch_error[scope]
        for name in _OPTIONAL:
            tensor = getattr(self, name)
            if tensor is not None:
                tensors[name] = tensor
        content = {
            "scopes": self.scopes,
            "layers": self.layers,
            "queries": self.queries,
            "tokens": self.tokens,
            "key_tokens": self.key_tokens,
            "plan": None if self.plan is None else str(self.plan),
            "arguments": self.arguments,
            "block": self.block,
        }
        return tensors, content

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], content: Any, name: str) -> Attribution:
        """The inverse of `_parts`; ``name`` is that of the file."""
        try:
            scopes = tuple(content["scopes"])
            cut = [scope for scope in scopes if f"top.{scope}.{_OF_TOP[0]}" in tensors]
            attribution = cls(
                maps={scope: tensors[f"maps.{scope}"] for scope in scopes if scope not in cut},
                top={scope: Top(*(tensors[f"top.{scope}.{part}"] for part in _OF_TOP)) for scope in cut},
                block=content.get("block"),
                bias={scope: tensors[f"bias.{scope}"] for scope in scopes},
                sketch_error={s: tensors[f"sketch_error.{s}"] for s in scopes if f"sketch_error.{s}" in tensors},
                tokens=[list(sequence) for sequence in content["tokens"]],
                layers=tuple(content["layers"]),
                queries=tuple(content["queries"]),
                scopes=scopes,
                mask=tensors["mask"],
                error=tensors["error"],
                plan=content["plan"],
                arguments=dict(content["arguments"]),
                key_tokens=content.get("key_tokens"),
                key_mask=tensors.get("key_mask"),
                experts=tensors.get("experts"),
                shares=tensors.get("shares"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
        attribution._check_shapes(name)
        return attribution

    def to_pandas(self, scopes: str | Sequence[str] | None = None) -> pandas.DataFrame:
        """One row per scope, layer, sequence, query token and key token (real tokens only): its norm.

        Columns ``scope``, ``layer``, ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token``,
        ``norm``, and where a scope is told apart by head or by expert, ``head`` or ``expert`` (missing elsewhere).
        With keep=TopK only the kept pairs; with keep=Pool one row per pair of blocks, ``norm`` its mean, with the
        position of the first token of a block and the text of its first and last.
        """
        import pandas as pd

        names = self.scopes if scopes is None else (scopes,) if isinstance(scopes, str) else tuple(scopes)
        frames = [self._frame(self.scope(name), batch) for name in names for batch in range(self.mask.shape[0])]
        frame = pd.concat(frames, ignore_index=True)
        for column in ("scope", "query_token", "key_token"):
            frame[column] = frame[column].astype("category")
        for column in ("head", "expert"):
            if column in frame:
                frame[column] = frame[column].astype("Int64")
        return frame

    def of_expert(self, number: int, scope: str | None = None) -> Tensor:
        """What one expert carried, ``[L, B, N, T]``: zero for tokens that do not go to it.

        ``scope`` names one that is told apart by expert (None: the only one). Raises ValueError where there is none.
        """
        apart = [name for name in self.scopes if _axis(name) == "expert"]
        name = scope if scope is not None else apart[0] if apart else None
        if self.experts is None or name not in apart:
            raise ValueError(
                f"scope {scope!r} is not told apart by expert; computed and told apart: {', '.join(apart) or 'none'}. "
                'Ask attribute for scopes=["..._ff_experts"].'
            )
        chosen = (self.experts == number).movedim(-1, 2)[..., None]  # [L, B, k, N, 1]
        return (self._map(name) * chosen).sum(2)

    def plot(
        self,
        scope: str = "layer",
        layer: int = -1,
        batch: int = 0,
        *,
        head: int | None = None,
        expert: int | None = None,
        **options: Any,
    ) -> Figure:
        """A matplotlib figure of one map, real tokens only; with keep=TopK of the kept entries, with Pool of blocks.

        ``layer`` is the model's number of the layer, or negative: counted from the last computed one. ``head`` picks a
        head of ``attn_heads``, ``expert`` one of a mixture. ``options`` go to `ffattr.plot.map_figure`.
        """
        from . import plot

        name, index = self.scope(scope), self._layer_index(layer)
        if not -self.mask.shape[0] <= batch < self.mask.shape[0]:
            raise IndexError(f"batch {batch} is out of range: there are {self.mask.shape[0]} sequences")
        values = self._one(name, index, batch)
        title = f"{name}, layer {self.layers[index]}"
        if _axis(name) == "expert":
            if expert is None:
                raise ValueError(f"scope {name} is told apart by expert: name one of them with expert=")
            assert self.experts is not None
            chosen = (self.experts[index, batch] == expert).T[..., None]  # [k, N, 1]
            values, title = (values * chosen).sum(0), f"{title}, expert {expert}"
        elif expert is not None:
            raise ValueError(f"expert={expert} is for scopes told apart by expert; {name} is summed over experts")
        if name == "attn_heads":
            if head is None or not -values.shape[0] <= head < values.shape[0]:
                raise ValueError(f"scope attn_heads has {values.shape[0]} heads; got head={head}: name one of them")
            values, title = values[head], f"{title}, head {head % values.shape[0]}"
        elif head is not None:
            raise ValueError(f"head={head} is for the scope attn_heads; {name} is summed over heads")
        rows, keys = self._ticks(batch)
        return plot.map_figure(
            values[rows.places][:, keys.places], rows.labels, keys.labels, **{"title": title, **options}
        )

    def _layer_index(self, layer: int) -> int:
        if -len(self.layers) <= layer < 0:
            return layer + len(self.layers)
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not computed; computed: {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _one(self, scope: str, index: int, batch: int) -> Tensor:
        """A map ``[..., N, T]`` of one layer and sequence; of the kept entries where these are all."""
        if scope not in self.top:
            return self._map(scope)[index, batch]
        top = self.top[scope]
        one = Top(*(getattr(top, part)[index : index + 1, batch : batch + 1 or None] for part in _OF_TOP))
        return one.dense(self._key_mask.shape[1])[0, 0]

    def _ticks(self, batch: int) -> tuple[Ticks, Ticks]:
        """Of the rows and columns of the maps of sequence ``batch`` that are not padding."""
        real, keys = self.mask[batch].cpu(), self._key_mask[batch].cpu()
        queries = torch.tensor(self.queries, dtype=torch.int64)
        return (
            Ticks.of(queries, real[queries], self.tokens[batch] if self.tokens else [], self.block),
            Ticks.of(torch.arange(len(keys)), keys, self._key_tokens[batch] if self._key_tokens else [], self.block),
        )

    @property
    def _key_tokens(self) -> list[list[str]]:
        return self.tokens if self.key_tokens is None else self.key_tokens

    @property
    def _key_mask(self) -> Tensor:
        return self.mask if self.key_mask is None else self.key_mask

    def _frame(self, scope: str, batch: int) -> pandas.DataFrame:
        rows, keys = self._ticks(batch)
        if scope in self.top:
            top = self.top[scope]
            values, key = (part[:, batch].cpu()[..., rows.places, :] for part in (top.values, top.keys))
        else:
            values, key = self._map(scope)[:, batch].cpu()[..., rows.places, :][..., keys.places], keys.positions
        apart = None
        if _axis(scope) == "expert":
            assert self.experts is not None
            numbers = self.experts[:, batch].cpu()[:, rows.places].transpose(1, 2)[..., None]  # [L, k, N', 1]
            apart = "expert", numbers
        elif _axis(scope) == "head":
            apart = "head", torch.arange(values.shape[1])[:, None, None]
        frame = table(values, key, self.layers, rows, keys, apart)
        frame.insert(0, "scope", scope)
        frame.insert(2, "batch", batch)
        return frame

    def _check_shapes(self, name: str) -> None:
        sequences, tokens = self._key_mask.shape if self._key_mask.dim() == 2 else (-1, -1)
        rows, block = (len(self.layers), sequences, len(self.queries)), self.block or 1
        for scope in self.scopes:
            cut = self.top.get(scope)
            if cut is None:
                tensors = {"the map": self.maps[scope]}
                inner = (math.ceil(rows[2] / block), math.ceil(tokens / block))
            else:
                tensors = {"the top of": cut.values, "the keys of": cut.keys}
                inner = (rows[2], cut.values.shape[-1])
            for what, tensor in tensors.items():
                shape = tuple(tensor.shape)
                if shape[:2] + shape[-2:] != rows[:2] + inner or len(shape) != (5 if _axis(scope) else 4):
                    raise FileFormatError(
                        f"{name!r}: {what} {scope} has shape {list(shape)}, expected {[*rows[:2], *inner]} (layers, "
                        "sequences, queries, tokens)"
                    )


def _axis(scope: str) -> str | None:
    """What a scope is told apart by, which its maps have as one more axis."""
    return "head" if scope == "attn_heads" else "expert" if scope.endswith("_experts") else None
