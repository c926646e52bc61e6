"""Attention rollout: what the tokens of a layer's output have of its model's input tokens, through all layers.

Shapes: ``L`` layers, ``B`` sequences, ``H`` heads, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import names_missing_extra
from ..selection import scope_named
from .rows import Maps, NamedMaps, check_one_stack, read_names

if TYPE_CHECKING:
    import pandas

__all__ = ["rollout", "rollout_maps"]

_HALF = 0.5  # of Abnar and Zuidema: attention and the residual count the same


@names_missing_extra
def rollout(
    maps: NamedMaps | Tensor | list[Tensor] | tuple[Tensor, ...],
    scope: str | Sequence[str] = "layer",
    *,
    residual: float | None = None,
    start: int | None = None,
    mask: Tensor | None = None,
) -> pandas.DataFrame:
    """Returns `rollout_maps` as a table, one row for each pair of real tokens after each layer.

    Columns: ``scope`` (of a model's attention weights: ``weights``), ``layer`` (up to and including which one),
    ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token`` (attention weights come without tokens:
    positions again) and ``share``; the shares of a query sum to 1.

    Several scopes come one below the other: ``["atb", "layer"]`` is rollout without and with the feed-forward blocks.
    Arguments and errors as for `rollout_maps`.

    >>> frame = ffattr.analysis.rollout(attr, ["atb", "layer"])
    >>> list(frame)
    ['scope', 'layer', 'batch', 'query', 'key', 'query_token', 'key_token', 'share']
    >>> frame.groupby(["scope", "layer", "batch", "query"])["share"].sum().round(6).unique().tolist()
    [1.0]
    """
    import pandas as pd

    frames = []
    for name in (scope,) if isinstance(scope, str) else scope:
        shares = rollout_maps(maps, name, residual=residual, start=start, mask=mask)
        if isinstance(maps, (Tensor, list, tuple)):
            real = _read_mask(shares, mask)
            tokens: Sequence[Sequence[str]] = []
            called, first = "weights", 0 if start is None else start
        else:
            real, tokens = maps.mask, read_names(maps)
            called, first = scope_named(name, maps.scopes), maps.layers[0] if start is None else start
        at = (real[:, :, None] & real[:, None, :]).expand(shares.shape).nonzero(as_tuple=True)
        layer, batch, query, key = (place.cpu() for place in at)
        frame = pd.DataFrame({"layer": (layer + first).numpy(), "batch": batch.numpy()})
        frame["query"], frame["key"] = query.numpy(), key.numpy()
        for column, places in (("query_token", query), ("key_token", key)):
            both = zip(batch.tolist(), places.tolist(), strict=True)
            frame[column] = [tokens[b][t] if tokens else str(t) for b, t in both]
        frame["share"] = shares[at].cpu().numpy()
        frame.insert(0, "scope", called)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def rollout_maps(
    maps: Maps | Tensor | list[Tensor] | tuple[Tensor, ...],
    scope: str = "layer",
    *,
    residual: float | None = None,
    start: int | None = None,
    mask: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """Multiplies the row-normalised maps of layers ``start`` to each layer: ``[L, B, T, T]``, zero at padding.

    With ``M`` the map of a layer, every row divided by its sum over the real tokens (``normalise=False``: as it is, so
    that products are of norms), ``A = (1 - r) M + r I`` and
    ``R_l = A_l R_(l-1)``, where ``R`` before the first layer is ``I`` (``r``: ``residual``). Row ``i`` of ``R_l`` says
    in which shares the input tokens of layer ``start`` are in token ``i`` after layer ``l``.

    maps: an `ffattr.Attribution` of all queries and of layers without a gap. Its maps hold the residual connection
        already (from ``attn_res``, in a pre-LN layer ``atb``, on) and the norms, so ``residual`` is 0 if None. Or a
        model's own ``attentions`` (``output_attentions=True``, a tensor ``[L, B, T, T]`` or with heads
        ``[L, B, H, T, T]``, or a tuple of one for each layer): heads are averaged, and ``residual`` is 0.5 if None:
        the method of Abnar and Zuidema 2020 (arXiv 2005.00928). Or maps of your own ``[L, B, T, T]`` with
        ``residual=0``: those of `globenc_maps` with ``normalise=False`` are GlobEnc (Modarressi et al. 2022, arXiv
        2205.03286), which row-normalised maps of ``"layer"`` are not.
    start: the model's number of the first layer of the product; None: the first one that there is.
    mask: of attention weights, ``[B, T]``, True (or 1) at real tokens; None: all of them are.

    Raises ValueError for maps that do not chain (some queries, layers with a gap, keys that are not the queries'
    tokens, maps that were not kept whole or are told apart by head), KeyError for a scope that was not computed.

    >>> shares = ffattr.analysis.rollout_maps(attr, "atb")
    >>> shares.shape == attr["atb"].shape
    True
    >>> attentions = torch.full((2, 1, 2, 2), 0.5)  # two layers, two tokens: A has 0.75 on the diagonal, beside it 0.25
    >>> ffattr.analysis.rollout_maps(attentions)[-1, 0, 0].tolist()
    [0.625, 0.375]
    """
    if not isinstance(maps, (Tensor, list, tuple)):
        check_one_stack(maps)
    if isinstance(maps, (Tensor, list, tuple)):
        if scope != "layer":
            raise ValueError(f"scope={scope!r} is for an Attribution; attention weights have none")
        layers, share = _stack_weights(maps), _HALF if residual is None else residual
        numbers: Sequence[int] = range(len(layers))
        real = _read_mask(layers, mask)
    else:
        if mask is not None:
            raise ValueError("mask= is for attention weights; an Attribution has its own")
        layers, share = _read_chained_maps(maps, scope), 0.0 if residual is None else residual
        numbers, real = maps.layers, maps.mask
    if not 0 <= share < 1:
        raise ValueError(f"residual={share!r}, expected a number of at least 0 and below 1")
    if start is not None and start not in numbers:
        raise ValueError(f"start={start!r} is none of the layers {', '.join(map(str, numbers))}")
    layers = layers[0 if start is None else list(numbers).index(start) :]

    dtype = torch.promote_types(layers.dtype, torch.float32)
    identity = torch.eye(layers.shape[-1], dtype=dtype, device=layers.device)
    pairs = real[:, :, None] & real[:, None, :]
    reached, found = identity * pairs, []
    for layer in layers:
        rows = layer.to(dtype).masked_fill(~pairs, 0)
        if normalise:
            rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # a row of zeros stays one
        mixed = (1 - share) * rows + share * identity * pairs
        reached = mixed @ reached
        found.append(reached)
    return torch.stack(found) if found else layers.to(dtype)


def _stack_weights(weights: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Returns the weights as ``[L, B, T, T]``. Raises ValueError for other shapes than those of attention weights."""
    if not isinstance(weights, Tensor):
        if not weights or any(layer is None for layer in weights):
            raise ValueError(
                "no attention weights: load the model with attn_implementation='eager' and call it with "
                "output_attentions=True"
            )
        if not all(isinstance(layer, Tensor) and layer.shape == weights[0].shape for layer in weights):
            raise TypeError(
                f"attention weights are {str(weights)[:80]}, expected a tensor for each layer, all of one shape"
            )
        weights = torch.stack(tuple(weights))
    if weights.dim() not in (4, 5) or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(
            f"attention weights have shape {list(weights.shape)}, expected [layers, sequences, tokens, tokens], or "
            "with heads before the tokens"
        )
    return weights.mean(2) if weights.dim() == 5 else weights


def _read_mask(layers: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``[B, T]``, True at real tokens: everywhere without a ``mask``."""
    shape = layers.shape[1:3]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=layers.device)
    if mask.shape != shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, expected {list(shape)} (sequences, tokens)")
    return mask.to(layers.device).bool()


def _read_chained_maps(maps: Maps, scope: str) -> Tensor:
    """Returns the maps ``[L, B, T, T]`` of a scope. Raises ValueError where a layer's are not the next one's input."""
    check_one_stack(maps)
    name = scope_named(scope, maps.scopes)
    sequences, tokens = maps.mask.shape
    if maps.key_mask is not None:
        raise ValueError(
            f"the columns of {name} are not the tokens of its rows (an encoder's tokens, or groups): rollout "
            "takes maps from tokens to the same tokens"
        )
    if list(maps.queries) != list(range(tokens)):
        raise ValueError(
            f"rollout needs the rows of all {tokens} tokens, in their order, because each is a key of the next "
            f"layer; there are {len(maps.queries)}: compute the maps with queries=None"
        )
    layers = list(maps.layers)
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))):
        raise ValueError(
            f"rollout multiplies the maps of layers that follow each other, got layers {', '.join(map(str, layers))}: "
            "compute the maps with layers=None"
        )
    found = maps.maps.get(name)
    if found is None or found.shape != (len(layers), sequences, tokens, tokens):
        raise ValueError(
            f"no whole maps of {name}, one for each layer and sequence: compute a scope that is not told apart by head "
            "or expert with keep='dense' and all keys"
        )
    return found
