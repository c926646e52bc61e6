from __future__ import annotations

import documented
import pytest
import tiny_models
import torch

import ffattr

LONG = "the cat " * 40
TEXTS = ["The cat sat.", "", LONG, None, "Dogs barking.", "  \n"]


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("bert", num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)


@pytest.fixture(scope="module")
def tokenizer():
    return documented.tokenizer()


def test_every_text_is_a_sequence_or_has_a_record(model, tokenizer, tmp_path):
    attr = ffattr.attribute(model, TEXTS, tokenizer=tokenizer, on_error="skip")
    alone = ffattr.attribute(model, [TEXTS[0], TEXTS[4]], tokenizer=tokenizer)
    assert torch.equal(attr["layer"], alone["layer"])
    assert attr.taken == (0, 4)
    assert [(one.index, one.error_type) for one in attr.skipped] == [
        (1, "ValueError"),
        (2, "ValueError"),
        (3, "TypeError"),
        (5, "ValueError"),
    ]
    assert attr.skipped[0].message == "text 1 ('') has no tokens; expected at least one. Remove it."
    assert "82 tokens" in attr.skipped[1].message
    assert "with None at 3, expected" in attr.skipped[2].message
    assert "; 4 inputs skipped" in repr(attr)
    attr.save(tmp_path / "maps.safetensors")
    again = ffattr.load(tmp_path / "maps.safetensors")
    assert (again.skipped, again.taken) == (attr.skipped, attr.taken)


def test_lists_of_ids_and_conversations_too(model, tokenizer):
    attr = ffattr.attribute(model, [[4, 5, 6], [], [4, 999]], on_error="skip")
    assert attr.taken == (0,)
    assert [one.index for one in attr.skipped] == [1, 2]
    assert attr.skipped[0].message.startswith("inputs[1] has no tokens")


def test_where_nothing_is_wrong_nothing_is_skipped(model, tokenizer):
    attr = ffattr.attribute(model, TEXTS[:1], tokenizer=tokenizer, on_error="skip")
    assert attr.skipped == ()
    assert attr.taken == (0,)
    assert "skipped" not in repr(attr)
    assert "skipped" not in attr.arguments


def test_what_cannot_be_skipped_says_so(model, tokenizer):
    with pytest.raises(ValueError, match="none of 2 inputs can be read, the first of them: text 0"):
        ffattr.attribute(model, ["", " "], tokenizer=tokenizer, on_error="skip")
    with pytest.raises(TypeError, match="on_error='skip' is for a list of texts"):
        ffattr.attribute(model, "The cat.", tokenizer=tokenizer, on_error="skip")
    with pytest.raises(ValueError, match="on_error='ignore', expected 'raise' or 'skip'"):
        ffattr.attribute(model, ["a"], tokenizer=tokenizer, on_error="ignore")
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens"):
        ffattr.attribute(model, TEXTS[:2], tokenizer=tokenizer)
