"""`Attribution`: what `ffattr.attribute` returns, how it is saved, and the views of it.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``H`` heads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import FileFormatError, write

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Attribution"]

_OPTIONAL = ("key_mask", "experts", "shares")  # tensors that not every attribution has


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

    def scope(self, name: str) -> str:
        """The name of a computed scope: ``"layer"`` stands for the last one. Raises `KeyError` listing the others."""
        if name == "layer":
            return self.scopes[-1]
        if name not in self.maps:
            raise KeyError(f"no scope {name!r} here; computed: {', '.join(self.scopes)} (and the alias 'layer')")
        return name

    def __getitem__(self, scope: str) -> Tensor:
        """``attr["atb_ff"]``, or ``attr["layer"]`` for the last scope."""
        return self.maps[self.scope(scope)]

    def __repr__(self) -> str:
        sequences, tokens = self.mask.shape
        return (
            f"Attribution({len(self.layers)} layers, {sequences} x {tokens} tokens, {len(self.queries)} queries, "
            f"scopes: {', '.join(self.scopes)})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `ffattr.load` reads: whole or not at all, never over half of an old one."""
        write(path, *self._parts())

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and what else there is as JSON takes it."""
        tensors = {"mask": self.mask, "error": self.error}
        for scope in self.scopes:
            tensors[f"maps.{scope}"] = self.maps[scope]
            tensors[f"bias.{scope}"] = self.bias[scope]
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
        }
        return tensors, content

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], content: Any, name: str) -> Attribution:
        """The inverse of `_parts`; ``name`` is that of the file."""
        try:
            scopes = tuple(content["scopes"])
            attribution = cls(
                maps={scope: tensors[f"maps.{scope}"] for scope in scopes},
                bias={scope: tensors[f"bias.{scope}"] for scope in scopes},
                tokens=[list(sequence) for sequence in content["tokens"]],
                layers=tuple(content["layers"]),
                queries=tuple(content["queries"]),
                scopes=scopes,
                mask=tensors["mask"],
                error=tensors["error"],
                plan=content["plan"],
                arguments=dict(content["arguments"]),
                key_tokens=content.get("key_tokens"),
                **{optional: tensors.get(optional) for optional in _OPTIONAL},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
        attribution._check_shapes(name)
        return attribution

    def to_pandas(self, scopes: str | Sequence[str] | None = None) -> pandas.DataFrame:
        """One row per scope, layer, sequence, query token and key token (real tokens only): its norm.

        Columns ``scope``, ``layer``, ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token``,
        ``norm``, and where a scope is told apart by head or by expert, ``head`` or ``expert`` (missing elsewhere).
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
        return (self.maps[name] * chosen).sum(2)

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
        """A matplotlib figure of one map, real tokens only.

        ``layer`` is the model's number of the layer, or negative: counted from the last computed one. ``head`` picks a
        head of ``attn_heads``, ``expert`` one of a mixture. ``options`` go to `ffattr.plot.map_figure`.
        """
        from . import plot

        name, index = self.scope(scope), self._layer_index(layer)
        if not -self.mask.shape[0] <= batch < self.mask.shape[0]:
            raise IndexError(f"batch {batch} is out of range: there are {self.mask.shape[0]} sequences")
        values = self.maps[name][index, batch]
        title = f"{name}, layer {self.layers[index]}"
        if _axis(name) == "expert":
            if expert is None:
                raise ValueError(f"scope {name} is told apart by expert: name one of them with expert=")
            values, title = self.of_expert(expert, name)[index, batch], f"{title}, expert {expert}"
        elif expert is not None:
            raise ValueError(f"expert={expert} is for scopes told apart by expert; {name} is summed over experts")
        if name == "attn_heads":
            if head is None or not -values.shape[0] <= head < values.shape[0]:
                raise ValueError(f"scope attn_heads has {values.shape[0]} heads; got head={head}: name one of them")
            values, title = values[head], f"{title}, head {head % values.shape[0]}"
        elif head is not None:
            raise ValueError(f"head={head} is for the scope attn_heads; {name} is summed over heads")
        rows, keys = self._real(batch)
        return plot.map_figure(
            values[rows][:, keys],
            [_token(self.tokens, batch, self.queries[row]) for row in rows.tolist()],
            [_token(self._key_tokens, batch, key) for key in keys.tolist()],
            **{"title": title, **options},
        )

    def _layer_index(self, layer: int) -> int:
        if -len(self.layers) <= layer < 0:
            return layer + len(self.layers)
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not computed; computed: {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _real(self, batch: int) -> tuple[Tensor, Tensor]:
        """Rows ``[N']`` and keys ``[T']`` of a map of sequence ``batch`` that are not padding."""
        rows = self.mask[batch].cpu()[list(self.queries)]
        return rows.nonzero().flatten(), self._key_mask[batch].cpu().nonzero().flatten()

    @property
    def _key_tokens(self) -> list[list[str]]:
        return self.tokens if self.key_tokens is None else self.key_tokens

    @property
    def _key_mask(self) -> Tensor:
        return self.mask if self.key_mask is None else self.key_mask

    def _frame(self, scope: str, batch: int) -> pandas.DataFrame:
        import numpy as np
        import pandas as pd

        rows, keys = self._real(batch)
        values = self.maps[scope][:, batch].cpu()
        values = values[..., rows, :][..., keys]
        apart = _axis(scope)
        axes = [torch.tensor(self.layers), torch.tensor(self.queries)[rows], keys]
        if apart:
            axes.insert(1, torch.arange(values.shape[1]))
        grid = [axis.flatten().numpy() for axis in torch.meshgrid(*axes, indexing="ij")]
        query, key = grid[-2], grid[-1]
        query_token, key_token = (
            np.array([_token(tokens, batch, position) for position in range(mask.shape[1])], dtype=object)
            for tokens, mask in ((self.tokens, self.mask), (self._key_tokens, self._key_mask))
        )
        columns: dict[str, Any] = {
            "scope": scope,
            "layer": grid[0],
            "batch": batch,
            "query": query,
            "key": key,
            "query_token": query_token[query],
            "key_token": key_token[key],
            "norm": values.flatten().to(torch.promote_types(values.dtype, torch.float32)).numpy(),
        }
        if apart == "expert":
            assert self.experts is not None
            numbers = self.experts[:, batch].cpu()[:, rows].transpose(1, 2)[..., None]  # [L, k, N', 1]
            columns[apart] = numbers.expand(values.shape).flatten().numpy()
        elif apart:
            columns[apart] = grid[1]
        return pd.DataFrame(columns)

    def _check_shapes(self, name: str) -> None:
        sequences, tokens = self._key_mask.shape if self._key_mask.dim() == 2 else (-1, -1)
        outer, inner = (len(self.layers), sequences), (len(self.queries), tokens)
        for scope in self.scopes:
            shape = tuple(self.maps[scope].shape)
            if shape[:2] + shape[-2:] != outer + inner or len(shape) != (5 if _axis(scope) else 4):
                raise FileFormatError(
                    f"{name!r}: the map {scope} has shape {list(shape)}, expected {[*outer, *inner]} (layers, "
                    "sequences, queries, tokens)"
                )


def _axis(scope: str) -> str | None:
    """What a scope is told apart by, which its maps have as one more axis."""
    return "head" if scope == "attn_heads" else "expert" if scope.endswith("_experts") else None


def _token(tokens: list[list[str]], batch: int, position: int) -> str:
    return tokens[batch][position] if tokens else str(position)
