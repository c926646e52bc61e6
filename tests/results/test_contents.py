"""How maps are read without padding, whatever is kept of them."""

from dataclasses import replace

import pytest
import torch
from keeping import kept, some
from synthetic import attribution

from ffattr import Pool, TopK, load
from ffattr.errors import FileFormatError
from ffattr.results.contents import (
    SHARED,
    describe_skipped,
    drop_padding,
    key_tokens,
    label_axes,
    mark_own_tokens,
    number_expert,
    read_map,
)
from ffattr.selection import Skipped


def test_axes_are_named_by_real_tokens():
    rows, keys = label_axes(some(queries=(5, 0, 2)), 0)  # token 2 is padding
    assert (rows.indices.tolist(), rows.positions.tolist(), rows.labels) == ([0, 1], [5, 0], ["tok0.5", "tok0.0"])
    assert keys.indices.tolist() == keys.positions.tolist() == [0, 1, 3, 4, 5, 6]
    assert keys.labels == [f"tok0.{n}" for n in (0, 1, 3, 4, 5, 6)]


def test_axes_of_blocks_are_named_by_their_ends():
    rows, keys = label_axes(kept(Pool(3), some(queries=(5, 0, 2, 4))), 0)
    assert (rows.indices.tolist(), rows.positions.tolist()) == ([0, 1], [5, 4])
    assert rows.labels == ["tok0.5 … tok0.0", "tok0.4"]
    assert keys.labels == ["tok0.0 … tok0.1", "tok0.3 … tok0.5", "tok0.6"]


def test_axes_without_texts_are_named_by_numbers():
    rows, keys = label_axes(replace(some(), tokens=[]), 1)
    assert rows.labels == keys.labels == ["2", "3", "4"]


def test_a_map_is_read_of_whatever_was_kept():
    attr = some()
    expected = attr.maps["attn_heads"][2, 1]
    assert torch.equal(read_map(attr, "attn_heads", 2, -1), expected)
    assert torch.equal(read_map(kept(TopK(7), attr), "attn_heads", 2, 1), expected)
    assert read_map(kept(Pool(2), attr), "attn_heads", 2, 1).shape == (2, 4, 4)
    with pytest.raises(IndexError, match="there are 2 sequences"):
        read_map(attr, "atb", 0, 2)


def test_padding_is_dropped_from_the_last_two_axes():
    attr = some(queries=(5, 0, 2))
    shown = drop_padding(attr.maps["attn_heads"][0, 0], *label_axes(attr, 0))
    assert torch.equal(shown, attr.maps["attn_heads"][0, 0][:, :2][..., [0, 1, 3, 4, 5, 6]])


def test_own_tokens_of_queries_blocks_groups_and_an_encoder():
    attr = attribution(("atb",), tokens=4, real=(4,), queries=(3, 1))

    def own(result):
        return mark_own_tokens(result, 0, *label_axes(result, 0)).int().tolist()

    assert own(attr) == [[0, 0, 0, 1], [0, 1, 0, 0]]
    columns = {"key_tokens": [["a", "b"]], "key_mask": torch.ones(1, 2).bool()}
    assert own(replace(attr, groups=torch.tensor([[0, 0, 1, 1]]), **columns)) == [[0, 1], [1, 0]]
    assert own(replace(attr, **columns)) == [[0, 0], [0, 0]]
    blocks = kept(Pool(2), attribution(("atb",), tokens=4, real=(4,)))
    assert own(blocks) == [[1, 0], [0, 1]]


def test_columns_are_called_as_the_rows_where_nothing_else_is_said():
    attr = attribution(("atb",))
    assert key_tokens(attr) is attr.tokens
    other = [["x"] * 6] * 2
    assert key_tokens(replace(attr, key_tokens=other)) is other


def test_numbers_of_experts() -> None:
    assert number_expert(3) == 3
    assert number_expert("shared") == SHARED
    for wrong, kind in (("gate", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(kind, match="expert is "):
            number_expert(wrong)


def test_what_was_skipped_is_told_by_the_arguments():
    some = [Skipped(2, "ValueError", "text 2 has no tokens"), Skipped(0, "TypeError", "no text")]
    attr = attribution()
    assert (attr.skipped, attr.taken) == ((), (0, 1))
    attr.arguments |= describe_skipped(some)
    assert (attr.skipped, attr.taken) == (tuple(some), (1, 3))
    assert describe_skipped([]) == {}


@pytest.mark.parametrize("entries", [3, [3], [[0, "a"]], [[-1, "a", "b"]], [["0", "a", "b"]], [[True, "a", "b"]]])
def test_a_file_with_other_entries_of_what_was_skipped_is_damaged(entries, tmp_path):
    attr = attribution()
    attr.arguments["skipped"] = entries
    attr.save(tmp_path / "maps.safetensors")
    with pytest.raises(FileFormatError, match="'skipped', expected a place"):
        load(tmp_path / "maps.safetensors")
