"""Which keys make up the columns of a map: each its own, or groups, in blocks that hold every pair once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import random_layers
import torch
from made_packs import cut, pass_pack, sequences
from random_layers import HEADS, TOKENS, RandomLayer
from torch import Tensor

from ffattr.engine.key_blocks import KeyBlock, count_columns, cut_keys
from ffattr.engine.pack import OneSequence, Pack

GROUPS = [2, 2, 0, -1, 0, 0, 0, 3, 2]  # of nine tokens: four, none, three, one


def grouped(one: OneSequence, groups: list[int]) -> OneSequence:
    return replace(one, groups=torch.tensor(groups))


def blocks_of(layer: RandomLayer, pack: Pack, step: int, index: Tensor | None = None) -> list[KeyBlock]:
    given = pass_pack(layer, pack, index)
    return list(cut_keys(given.sources[0], given.passed.alpha[0], given.queries, step))


def causal() -> RandomLayer:
    layer = random_layers.layer()
    return replace(layer, attention=replace(layer.attention, causal=True))


def test_columns_are_keys_or_groups() -> None:
    layer = random_layers.layer(decoder=True)
    pack = Pack(tuple(sequences(layer)))
    own, cross = pass_pack(layer, pack).sources
    assert count_columns(own, pack) == [5, 1, 9, 3]
    assert count_columns(cross, pack) == [9, 11, 7, 10]
    some = Pack(tuple(grouped(one, [0] * (len(one.x) - 1) + [len(one.x) // 3]) for one in pack.sequences))
    assert count_columns(own, some) == [2, 1, 4, 2]
    assert count_columns(cross, some) == [9, 11, 7, 10]  # groups are those of the own tokens


@pytest.mark.parametrize("step", [1, 4, 9, 100])
def test_single_keys_are_cut_without_a_gap(step: int) -> None:
    layer = random_layers.layer()
    pack = Pack((cut(layer, list(range(TOKENS)), [3, 0, 8]),))
    whole = pass_pack(layer, pack).passed.alpha[0]
    found = blocks_of(layer, pack, step)
    assert [block.tokens for block in found] == [
        slice(start, min(start + step, TOKENS)) for start in range(0, TOKENS, step)
    ]
    assert torch.equal(torch.cat([block.alpha for block in found], -1), whole)
    to = torch.full((3, TOKENS), -1)
    for block in found:
        assert block.sequences is None
        assert block.position.tolist() == [token - block.tokens.start for token in (3, 0, 8)]  # type: ignore[union-attr]
        first = block.tokens.start  # type: ignore[union-attr]
        block.put_tile(torch.arange(first, first + block.alpha.shape[-1]).expand(3, -1), to)
    assert to.tolist() == [list(range(TOKENS))] * 3


def test_blocks_beyond_the_diagonal_are_left_out() -> None:
    layer = causal()
    pack = Pack((cut(layer, list(range(TOKENS)), [0, 1, 3]),))
    assert [block.tokens for block in blocks_of(layer, pack, 2)] == [slice(0, 2), slice(2, 4)]
    assert [block.tokens for block in blocks_of(layer, pack, 2, torch.tensor([0, 1]))] == [slice(0, 2)]


def test_a_query_without_any_weight_keeps_its_own_block() -> None:
    layer = random_layers.layer()
    pack = Pack((cut(layer, list(range(TOKENS)), [5]),))
    given = pass_pack(layer, pack)
    (block,) = cut_keys(given.sources[0], torch.zeros_like(given.passed.alpha[0]), given.queries, 3)
    assert block.tokens == slice(3, 6)
    assert block.position.tolist() == [2]


def test_of_several_sequences_all_keys_are_one_block() -> None:
    layer = random_layers.layer()
    pack = Pack(tuple(sequences(layer)))
    (block,) = blocks_of(layer, pack, 1)
    assert block.tokens == slice(0, 18)
    assert block.sequences is not None
    assert block.sequences.tolist() == [[0, 0], [3, 5], [4, 6], [4, 15], [7, 18]]
    assert block.position.tolist() == [0, 4, 2, 0, 2, 0, 1]
    to = torch.zeros(7, 9)
    block.put_tile(torch.ones(7, 9), to)
    assert to.sum(1).tolist() == [5, 5, 5, 1, 3, 3, 3]  # nothing in the padding


@pytest.mark.parametrize("step", [1, 100])
def test_groups_are_keys_with_the_heads_of_all_their_tokens(step: int) -> None:
    layer = random_layers.layer()
    rows = [3, 0, 7]
    pack = Pack((grouped(cut(layer, list(range(TOKENS)), rows), GROUPS),))
    weights = pass_pack(layer, pack).passed.alpha[0]
    to = torch.zeros(HEADS, 3, 4, dtype=torch.float64)
    beside = torch.zeros(3, 4)
    for block in blocks_of(layer, pack, step):
        padded = torch.cat([block.alpha, torch.zeros_like(block.alpha[:1])])
        by_token = padded.view(block.size, HEADS + 1, 3, -1)
        block.put_tile(by_token[:, :HEADS].sum(0), to)
        last = torch.arange(block.alpha.shape[-1]) == block.position[:, None]
        block.put_tile((by_token[:, HEADS].sum(0) + last).float(), beside)
    for column in (0, 2, 3):
        members = [token for token, group in enumerate(GROUPS) if group == column]
        torch.testing.assert_close(to[..., column], weights[..., members].sum(-1))
    assert not to[..., 1].any()
    assert beside.tolist() == [[GROUPS[row] == column for column in range(4)] for row in rows]


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (2, 2), (5, 6), (7, 8), (9, 12)])
def test_groups_are_padded_to_few_sizes(tokens: int, size: int) -> None:
    layer = random_layers.layer()
    pack = Pack((grouped(cut(layer, list(range(TOKENS)), [0]), [0] * tokens + [-1] * (TOKENS - tokens)),))
    (block,) = blocks_of(layer, pack, 100)
    assert block.size == size
    assert block.alpha.shape == (size * (HEADS + 1) - 1, 1, 1)
    assert isinstance(block.tokens, Tensor)
    assert block.tokens[:tokens].tolist() == list(range(tokens))


def test_head_vectors_in_scratch_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    values, own = torch.randn(6, 2, 3, generator=generator), torch.randn(6, 5, generator=generator)
    matrix = torch.randn(6, 5, generator=generator)
    none = torch.empty(0)
    block = KeyBlock(3, slice(0, 6), none, none, None, ())
    found = block.head_vectors(values, matrix, own)
    assert found.shape == (2, 9, 5)  # two keys of three tokens with two heads and a residual each
    assert torch.equal(found[1, 5], own[4])
    scratch = torch.full((100,), torch.nan)
    same = block.head_vectors(values, matrix, own, scratch)
    assert torch.equal(same, found)
    assert same.data_ptr() == scratch.data_ptr()
    assert scratch[90:].isnan().all()
