"""What may be asked, and what a wrong one is called."""

from __future__ import annotations

import pytest
import torch
from made_tokenizers import make_tokenizer, wordpiece

from ffattr.pipeline.toward.targets import Target, find_masks, parse_position, parse_targets

LABELS = {0: "bad", 1: "good"}


def test_every_kind_of_target_is_read():
    words = make_tokenizer()
    assert parse_targets(3, None, None) == [Target("3", 3)]
    assert parse_targets("cat", words, None) == [Target("cat", 6)]
    assert parse_targets(("cat", "dog"), words, None) == [Target("cat - dog", 6, 11)]
    assert parse_targets("predicted", None, None) == [Target("predicted", "predicted")]
    assert parse_targets([6, ("predicted", "next")], words, None) == [
        Target("cat", 6),
        Target("predicted - next", "predicted", "next"),
    ]
    assert parse_targets(["good", 0, (1, 0)], None, LABELS) == [
        Target("good", 1),
        Target("bad", 0),
        Target("good - bad", 1, 0),
    ]
    one, many = torch.arange(3.0), torch.ones(2, 3)
    (found,) = parse_targets(one, None, None)
    assert found.direction is not None
    assert torch.equal(found.direction, one)
    assert [target.label for target in parse_targets(many, None, None)] == ["direction 0", "direction 1"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([], ValueError, "empty list"),
        ((1, 2, 3), ValueError, "tuple of 3, expected a pair"),
        (1.5, TypeError, "target is 1.5, expected a token id"),
        (True, TypeError, "target is True"),
        (None, TypeError, "target is None"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"tensor \[2\] of torch.int64"),
        (torch.ones(1, 2, 3), ValueError, r"tensor \[1, 2, 3\]"),
        (torch.tensor([1.0, float("nan")]), ValueError, "NaN or infinite"),
        ("playing", ValueError, r"'playing' is 2 tokens \('play' '##ing'\), expected one: pass the first of them"),
    ],
)
def test_what_is_no_target_is_named(asked, error, message):
    with pytest.raises(error, match=message):
        parse_targets(asked, wordpiece(), None)


def test_a_piece_of_a_word_is_a_token_by_its_exact_name():
    assert parse_targets("##ing", wordpiece(), None)[0].plus == 8


def test_classes_are_told_from_tokens():
    with pytest.raises(ValueError, match="target is class 2, but the model has 0: 'bad', 1: 'good'"):
        parse_targets(2, None, LABELS)
    with pytest.raises(ValueError, match="'fair', which is none of the model's classes"):
        parse_targets("fair", None, LABELS)
    with pytest.raises(ValueError, match="this model's logits are of classes"):
        parse_targets("next", None, LABELS)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        parse_targets("cat", None, None)


def test_positions_are_counted_without_padding():
    assert parse_position(-1, None, [5, 3], None) == [[4], [2]]
    assert parse_position(range(2), None, [5, 3], None) == [[0, 1], [0, 1]]
    assert parse_position(torch.tensor([-2, 0]), None, [5, 3], None) == [[3, 0], [1, 0]]
    assert parse_position("cls", None, [5, 3], None) == [[0], [0]]
    assert parse_position("mean", None, [5, 3], None) == "mean"
    assert parse_position("mask", None, [5, 3], [[2], [1]]) == [[2], [1]]
    assert parse_position("generated", 2, [5, 5], None) == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("asked", "prompt", "error", "message"),
    [
        (3, None, IndexError, "position 3 does not exist in sequence 1, which has 3 tokens; padding is not read"),
        (-4, None, IndexError, "position -4 does not exist in sequence 1"),
        (1.0, None, TypeError, "position is 1.0"),
        ([], None, TypeError, "position is "),
        (True, None, TypeError, "position is True"),
        ("end", None, ValueError, "unknown position 'end'"),
        ("mask", None, ValueError, "needs the tokenizer"),
        (0, 2, ValueError, "prompt_length=2 is for position='generated', not 0"),
        ("generated", None, TypeError, "needs prompt_length="),
        ("generated", 0, ValueError, "prompt_length is 0, but sequence 0 has 5 tokens; expected 1 to 4"),
        ("generated", 2, ValueError, r"sequences of \[3, 5\] tokens"),
    ],
)
def test_what_is_no_position_is_named(asked, prompt, error, message):
    with pytest.raises(error, match=message):
        parse_position(asked, prompt, [5, 3], None)


def test_mask_tokens_are_found_among_the_real_ones():
    class Tokenizer:
        mask_token_id = 9

    ids, mask = torch.tensor([[1, 9, 2, 9], [0, 0, 9, 3]]), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert find_masks(ids, mask, Tokenizer()) == [[1], [0]]
    assert find_masks(None, mask, Tokenizer()) is None
    assert find_masks(ids, mask, None) is None
    with pytest.raises(ValueError, match="sequence 1 has 2 mask tokens; expected one"):
        parse_position("mask", None, [5, 3], [[2], [0, 1]])
