"""Which keys make up the columns of a map: every token its own, or groups of tokens, whose vectors are added up.

To the operators, a group of ``s`` tokens is one key with ``s (H + 1) - 1`` heads: those of all its tokens one after the
other, each followed by its residual, the last of which is the residual that operators know of. So the wide products
shrink from tokens to groups, exactly; a single token is a group of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.scopes import Scope
from .key_tokens import KeyTokens, write_head_vectors
from .pack import Pack, QueryBlock, list_starts, shift_index

__all__ = ["KeyBlock", "count_columns", "cut_keys"]

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

    def place_tile(self, tile: Tensor, maps: MutableMapping[Scope, Tensor], scope: Scope) -> None:
        """A tile into its columns of the map of a scope, or in the place of the map where it is all of that."""
        (rows, columns), *others = self._targets
        to = maps[scope]
        whole = not others and rows.start == 0 and isinstance(columns, slice) and columns.start == 0
        if whole and tile.shape == to.shape and tile.dtype == to.dtype:
            maps[scope] = tile
        else:
            self.put_tile(tile, to)

    def put_tile(self, tile: Tensor, to: Tensor) -> None:
        """A tile ``[..., n, M]`` into its columns of ``to`` ``[..., n, columns]``."""
        for rows, columns in self._targets:
            width = len(columns) if isinstance(columns, Tensor) else columns.stop - columns.start
            to[..., rows, columns] = tile[..., rows, :width]

    def head_vectors(self, values: Tensor, matrix: Tensor, own: Tensor, scratch: Tensor | None = None) -> Tensor:
        """`write_head_vectors` of these keys ``[m, G, width]``, in the memory of ``scratch`` if that is given.

        ``values`` ``[m * size, H, dh]`` and ``own`` ``[m * size, width]`` are those of the block's `tokens`.
        """
        shape = (len(values), values.shape[1] + 1, matrix.shape[1])
        to = values.new_empty(shape) if scratch is None else scratch[: math.prod(shape)].view(shape)
        return write_head_vectors(values, matrix, own, to).view(-1, self.size * shape[1], shape[2])


@dataclass(frozen=True)
class _Bucket:
    """Groups of up to ``size`` tokens: of each sequence ``members`` ``[G, size]`` (-1: none), ``columns`` ``[G]``."""

    size: int
    members: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]


def count_columns(source: KeyTokens, pack: Pack) -> list[int]:
    """How many columns the maps of each sequence have."""
    if not source.path.reads_own_tokens or pack.sequences[0].groups is None:
        return [last - first for first, last in itertools.pairwise(source.starts)]
    return [int(one.groups.max()) + 1 for one in pack.sequences if one.groups is not None]


def cut_keys(source: KeyTokens, alpha: Tensor, queries: QueryBlock, step: int) -> Iterator[KeyBlock]:
    """The keys of ``queries`` in blocks of about ``step`` tokens; of several sequences all keys at once.

    ``alpha`` ``[H, n, M]`` are the queries' weights. Blocks that no query gives weight to are left out: maps begin as
    zeros.
    """
    found = (
        _cut_single_keys(source, alpha, queries, step)
        if _has_single_keys(source, queries)
        else _cut_groups(source, alpha, queries, step)
    )
    for block in found:
        # To ask would stop a GPU at every block; its kernels skip what is empty.
        if alpha.is_cuda or _has_weight(block):
            yield block


def _has_single_keys(source: KeyTokens, queries: QueryBlock) -> bool:
    return not source.path.reads_own_tokens or queries.pack.sequences[0].groups is None


def _cut_single_keys(source: KeyTokens, alpha: Tensor, queries: QueryBlock, step: int) -> Iterator[KeyBlock]:
    whole = queries.key_range(source.starts)
    local = (
        queries.token_in_sequence if source.path.reads_own_tokens else torch.full_like(queries.token_in_sequence, -1)
    )
    if not queries.one_sequence:
        lengths = [source.starts[b + 1] - source.starts[b] for b, _ in queries.sequences()]
        targets = tuple(
            (rows, slice(0, length)) for (_, rows), length in zip(queries.sequences(), lengths, strict=True)
        )
        yield KeyBlock(1, whole, alpha, local, queries.sequence_bounds(lengths), targets)
        return
    for start in range(0, whole.stop - whole.start, step):
        stop = min(start + step, whole.stop - whole.start)
        tokens = slice(whole.start + start, whole.start + stop)
        position = shift_index(local, -start) if source.path.reads_own_tokens else local
        targets = ((slice(0, len(queries)), slice(start, stop)),)
        yield KeyBlock(1, tokens, alpha[..., start:stop].contiguous(), position, None, targets)


def _cut_groups(source: KeyTokens, alpha: Tensor, queries: QueryBlock, step: int) -> Iterator[KeyBlock]:
    for bucket in _sort_into_buckets(queries):
        if not queries.one_sequence:
            yield _block_of_bucket(source, alpha, queries, bucket)
            continue
        (members,), (columns,) = bucket.members, bucket.columns
        count = max(1, step // bucket.size)
        for some, into in zip(members.split(count), columns.split(count), strict=True):
            yield _block_of_bucket(source, alpha, queries, _Bucket(bucket.size, (some,), (into,)))


def _block_of_bucket(source: KeyTokens, alpha: Tensor, queries: QueryBlock, bucket: _Bucket) -> KeyBlock:
    size, heads, most = bucket.size, alpha.shape[0] + 1, max(len(members) for members in bucket.members)
    weights = alpha.new_zeros(size * heads, len(queries), most)
    position = torch.full_like(queries.token_in_sequence, -1)
    tokens, targets = [], []
    for (b, rows), members, columns in zip(queries.sequences(), bucket.members, bucket.columns, strict=True):
        found = members >= 0
        at = members.clamp_min(0)
        itself = at == queries.token_in_sequence[rows, None, None]  # [n, G, s]
        by_token = torch.cat([alpha[:, rows][:, :, at], itself[None].to(alpha)])  # [H + 1, n, G, s]
        by_token = (by_token * found).permute(3, 0, 1, 2).flatten(0, 1)  # [s (H + 1), n, G]
        weights[:, rows, : len(members)] = by_token
        last = itself[..., -1] & found[:, -1]
        position[rows] = torch.where(last.any(-1), last.to(torch.int64).argmax(-1) if last.shape[-1] else -1, -1)
        tokens.append((at + source.starts[b]).flatten())
        targets.append((rows, columns))
    bounds = queries.sequence_bounds([len(members) for members in bucket.members])
    return KeyBlock(size, torch.cat(tokens), weights[:-1], position, bounds, tuple(targets))


def _sort_into_buckets(queries: QueryBlock) -> list[_Bucket]:
    """The groups of the queries' sequences by their padded sizes."""
    found: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    for b, _ in queries.sequences():
        groups = queries.pack.sequences[b].groups
        assert groups is not None
        kept = (groups >= 0).nonzero()[:, 0]
        tokens = kept[groups[kept].sort(stable=True).indices]  # those of a group next to each other
        sizes = torch.bincount(groups[kept])
        first = torch.tensor(list_starts(sizes.tolist())[:-1], device=groups.device)
        padded = torch.tensor([_pad_size(size) for size in sizes.tolist()], device=groups.device)
        for size in padded[sizes > 0].unique().tolist():
            columns = ((padded == size) & (sizes > 0)).nonzero()[:, 0]
            place = torch.arange(size, device=groups.device)
            inside = place < sizes[columns, None]
            at = (first[columns, None] + place).clamp_max(len(tokens) - 1)
            found.setdefault(size, {})[b] = torch.where(inside, tokens[at], -1), columns
    buckets = []
    for size, by_sequence in sorted(found.items()):
        none = torch.empty(0, size, dtype=torch.int64, device=queries.index_in_pack.device)
        parts = [by_sequence.get(b, (none, none[:, 0])) for b, _ in queries.sequences()]
        buckets.append(_Bucket(size, tuple(members for members, _ in parts), tuple(columns for _, columns in parts)))
    return buckets


def _pad_size(size: int) -> int:
    return next((one for one in _SIZES if one >= size), 1 << max(0, size - 1).bit_length())


def _has_weight(block: KeyBlock) -> bool:
    """Whether any pair of a block has weight: none does beyond the causal diagonal or outside a window."""
    inside = (block.position >= 0) & (block.position < block.alpha.shape[-1])
    return bool(inside.any()) or bool(block.alpha.any())
