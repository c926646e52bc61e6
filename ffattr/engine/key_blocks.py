"""Which keys make up the columns of a map: every token its own, or groups of tokens, whose vectors are added up.

To the operators, a group of ``s`` tokens is one key with ``s (H + 1) - 1`` heads: those of all its tokens one after the
other, each followed by its residual, the last of which is the residual that operators know of. So the wide products
shrink from tokens to groups, exactly; a single token is a group of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .key_tokens import Source, features
from .pack import Pack, Part, starts_of

__all__ = ["KeyBlock", "blocks", "columns_of"]

_SIZES = (1, 2, 3, 4, 6, 8, 12)
"""Groups are padded up to these sizes and then to powers of two, so that few calls serve them all."""


@dataclass(frozen=True)
class KeyBlock:
    """``m`` keys of ``size`` tokens each, as operators want them: ``alpha`` ``[G - 1, n, M]`` with ``G = size (H + 1)``
    heads, ``position`` ``[n]`` and ``sequences`` (see `ffattr.ops`); the ``tokens`` ``[m * size]`` of their source."""

    size: int
    tokens: slice | Tensor
    alpha: Tensor
    position: Tensor
    sequences: Tensor | None
    _targets: tuple[tuple[slice, slice | Tensor], ...]

    def put(self, tile: Tensor, to: Tensor) -> None:
        """A tile ``[..., n, M]`` into its columns of ``to`` ``[..., n, columns]``."""
        for rows, columns in self._targets:
            width = len(columns) if isinstance(columns, Tensor) else columns.stop - columns.start
            to[..., rows, columns] = tile[..., rows, :width]

    def features(self, values: Tensor, matrix: Tensor, own: Tensor, scratch: Tensor | None = None) -> Tensor:
        """`ffattr.engine.key_tokens.features` of these keys ``[m, G, width]``, in the memory of ``scratch`` if that is given.

        ``values`` ``[m * size, H, dh]`` and ``own`` ``[m * size, width]`` are those of the block's `tokens`.
        """
        shape = (len(values), values.shape[1] + 1, matrix.shape[1])
        to = values.new_empty(shape) if scratch is None else scratch[: math.prod(shape)].view(shape)
        return features(values, matrix, own, to).view(-1, self.size * shape[1], shape[2])


@dataclass(frozen=True)
class _Bucket:
    """Groups of up to ``size`` tokens: of each sequence ``members`` ``[G, size]`` (-1: none), ``columns`` ``[G]``."""

    size: int
    members: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]


def columns_of(source: Source, pack: Pack) -> list[int]:
    """How many columns the maps of each sequence have."""
    if not source.route.own or pack.sequences[0].groups is None:
        return [last - first for first, last in itertools.pairwise(source.starts)]
    return [int(one.groups.max()) + 1 for one in pack.sequences if one.groups is not None]


def blocks(source: Source, alpha: Tensor, queries: Part, step: int) -> Iterator[KeyBlock]:
    """The keys of ``queries`` in blocks of about ``step`` tokens; of several sequences all keys at once.

    ``alpha`` ``[H, n, M]`` are the queries' weights. Blocks that no query gives weight to are left out: maps begin as
    zeros.
    """
    found = (
        _plain(source, alpha, queries, step) if _ungrouped(source, queries) else _grouped(source, alpha, queries, step)
    )
    for block in found:
        # To ask would stop a GPU at every block; its kernels skip what is empty.
        if alpha.is_cuda or _in_reach(block):
            yield block


def _ungrouped(source: Source, queries: Part) -> bool:
    return not source.route.own or queries.pack.sequences[0].groups is None


def _plain(source: Source, alpha: Tensor, queries: Part, step: int) -> Iterator[KeyBlock]:
    whole = queries.tokens(source.starts)
    local = queries.local if source.route.own else torch.full_like(queries.local, -1)
    if not queries.single:
        lengths = [source.starts[b + 1] - source.starts[b] for b, _ in queries.sequences()]
        targets = tuple(
            (rows, slice(0, length)) for (_, rows), length in zip(queries.sequences(), lengths, strict=True)
        )
        yield KeyBlock(1, whole, alpha, local, queries.bounds(lengths), targets)
        return
    for start in range(0, whole.stop - whole.start, step):
        stop = min(start + step, whole.stop - whole.start)
        tokens = slice(whole.start + start, whole.start + stop)
        position = local - start if source.route.own else local
        targets = ((slice(0, len(queries)), slice(start, stop)),)
        yield KeyBlock(1, tokens, alpha[..., start:stop].contiguous(), position, None, targets)


def _grouped(source: Source, alpha: Tensor, queries: Part, step: int) -> Iterator[KeyBlock]:
    for bucket in _buckets(queries):
        if not queries.single:
            yield _of_bucket(source, alpha, queries, bucket)
            continue
        (members,), (columns,) = bucket.members, bucket.columns
        count = max(1, step // bucket.size)
        for some, into in zip(members.split(count), columns.split(count), strict=True):
            yield _of_bucket(source, alpha, queries, _Bucket(bucket.size, (some,), (into,)))


def _of_bucket(source: Source, alpha: Tensor, queries: Part, bucket: _Bucket) -> KeyBlock:
    size, heads, most = bucket.size, alpha.shape[0] + 1, max(len(members) for members in bucket.members)
    weights = alpha.new_zeros(size * heads, len(queries), most)
    position = torch.full_like(queries.local, -1)
    tokens, targets = [], []
    for (b, rows), members, columns in zip(queries.sequences(), bucket.members, bucket.columns, strict=True):
        found = members >= 0
        at = members.clamp_min(0)
        itself = at == queries.local[rows, None, None]  # [n, G, s]
        by_token = torch.cat([alpha[:, rows][:, :, at], itself[None].to(alpha)])  # [H + 1, n, G, s]
        by_token = (by_token * found).permute(3, 0, 1, 2).flatten(0, 1)  # [s (H + 1), n, G]
        weights[:, rows, : len(members)] = by_token
        last = itself[..., -1] & found[:, -1]
        position[rows] = torch.where(last.any(-1), last.to(torch.int64).argmax(-1) if last.shape[-1] else -1, -1)
        tokens.append((at + source.starts[b]).flatten())
        targets.append((rows, columns))
    bounds = queries.bounds([len(members) for members in bucket.members])
    return KeyBlock(size, torch.cat(tokens), weights[:-1], position, bounds, tuple(targets))


def _buckets(queries: Part) -> list[_Bucket]:
    """The groups of the queries' sequences by their padded sizes."""
    found: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    for b, _ in queries.sequences():
        groups = queries.pack.sequences[b].groups
        assert groups is not None
        kept = (groups >= 0).nonzero()[:, 0]
        tokens = kept[groups[kept].sort(stable=True).indices]  # those of a group next to each other
        sizes = torch.bincount(groups[kept])
        first = torch.tensor(starts_of(sizes.tolist())[:-1], device=groups.device)
        padded = torch.tensor([_padded(size) for size in sizes.tolist()], device=groups.device)
        for size in padded[sizes > 0].unique().tolist():
            columns = ((padded == size) & (sizes > 0)).nonzero()[:, 0]
            place = torch.arange(size, device=groups.device)
            inside = place < sizes[columns, None]
            at = (first[columns, None] + place).clamp_max(len(tokens) - 1)
            found.setdefault(size, {})[b] = torch.where(inside, tokens[at], -1), columns
    buckets = []
    for size, by_sequence in sorted(found.items()):
        none = torch.empty(0, size, dtype=torch.int64, device=queries.rows.device)
        parts = [by_sequence.get(b, (none, none[:, 0])) for b, _ in queries.sequences()]
        buckets.append(_Bucket(size, tuple(members for members, _ in parts), tuple(columns for _, columns in parts)))
    return buckets


def _padded(size: int) -> int:
    return next((one for one in _SIZES if one >= size), 1 << max(0, size - 1).bit_length())


def _in_reach(block: KeyBlock) -> bool:
    """Whether any pair of a block has weight: none does beyond the causal diagonal or outside a window."""
    inside = (block.position >= 0) & (block.position < block.alpha.shape[-1])
    return bool(inside.any()) or bool(block.alpha.any())
