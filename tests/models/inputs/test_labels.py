from __future__ import annotations

import documented
import pytest
import tiny_models
import torch

import ffattr
from ffattr.models.inputs.labels import label_texts, label_tokens


@pytest.mark.parametrize(
    ("tokens", "text", "spans", "expected"),
    [
        (["the", "cat", "##s"], "The CATS", [(0, 3), (4, 7), (7, 8)], ["The", "CAT", "##S"]),
        (["\u2581the", "\u2581cat"], "The Cat", [(0, 3), (3, 7)], ["\u2581The", "\u2581Cat"]),
        (["\u0120the"], " The", [(0, 4)], ["\u0120The"]),
        (["dog</w>", "ba@@"], "Dog Ba", [(0, 3), (4, 6)], ["Dog</w>", "Ba@@"]),
        (["naive", "uber"], "Naïve Über", [(0, 5), (6, 10)], ["Naïve", "Über"]),
        (["[UNK]", "[CLS]"], "Zebra", [(0, 5), (0, 0)], ["[UNK]", "[CLS]"]),  # say something else, or nothing
        (["a", "[PAD]"], "A", [(0, 1)], ["A", "[PAD]"]),  # longer than the text
        (["\u00c3", "\u00a9"], "é", [(0, 1), (0, 1)], ["\u00c3", "\u00a9"]),  # parts of a character
        (["a"], "A", [(7, 9)], ["a"]),  # outside the text
    ],
)
def test_tokens_have_the_letters_of_the_text(tokens, text, spans, expected):
    assert label_tokens(tokens, text, spans) == expected


def test_where_nothing_differs_or_nothing_is_known_there_are_none():
    assert label_texts([["a", "b"]], ["a b"], [[(0, 1), (2, 3)]]) is None
    assert label_texts([["a"]], None, [None]) is None
    assert label_texts([["a"], ["b"]], ["A", "B"], [None, [(0, 1)]]) == [["a"], ["B"]]


TEXTS = ["The cat SAT on the mat.", "Dogs barking."]


@pytest.fixture(scope="module")
def attr():
    model = tiny_models.build("bert", num_hidden_layers=1, num_attention_heads=2)
    return ffattr.attribute(model, TEXTS, tokenizer=documented.tokenizer(), scopes=["atb", "atb_ff"])


def test_what_is_shown_keeps_the_case_and_tokens_are_the_tokenizers(attr, tmp_path):
    shown = ["[CLS]", "The", "cat", "SAT", "on", "the", "mat", ".", "[SEP]"]
    assert attr.tokens[0] == [one.lower() if one[0] != "[" else one for one in shown]
    assert attr.names[0] == shown
    assert [label.get_text() for label in attr.plot("atb").axes[0].get_yticklabels()] == shown
    assert attr.to_pandas("atb").query("batch == 0 and query == 0")["key_token"].tolist() == shown
    assert "SAT" in attr.top(50)["key_token"].tolist()
    assert attr.to_xarray("atb").query_token.values[0].tolist() == shown
    assert attr.to_words().tokens[1][:3] == ["[CLS]", "Dogs", "barking"]
    assert attr.plot_arcs("sat", "atb").axes[0].get_title().startswith("what “SAT”")
    assert {"SAT", "Dog"} <= set(ffattr.analysis.token_summary(attr, "atb")["token"])
    assert "SAT" in set(ffattr.analysis.ff_amp(attr)["query_token"])
    attr.save(tmp_path / "maps.safetensors")
    again = ffattr.load(tmp_path / "maps.safetensors")
    assert (again.names, again.tokens) == (attr.names, attr.tokens)
    attr.to_html(tmp_path / "page.html")
    assert '"SAT"' in (tmp_path / "page.html").read_text()


def test_columns_numbers_and_vectors_too(tmp_path):
    model, tokenizer = tiny_models.build("bert", num_hidden_layers=1, num_attention_heads=2), documented.tokenizer()
    assert ffattr.attribute(model, TEXTS[:1], tokenizer=tokenizer, keys=[1, 3]).key_tokens == [["The", "SAT"]]
    vectors = ffattr.vectors(model, TEXTS[:1], tokenizer=tokenizer, scopes="atb")
    assert ffattr.analysis.mixing_ratio(vectors)["query_token"].tolist()[:4] == ["[CLS]", "The", "cat", "SAT"]
    given = ffattr.contributions(model, TEXTS[:1], target=torch.ones(40), tokenizer=tokenizer)
    assert {"The", "SAT"} <= set(given.to_pandas()["token"])
    assert given.to_words().tokens[0][3] == "SAT"
    given.save(tmp_path / "given.safetensors")
    assert ffattr.load(tmp_path / "given.safetensors").names == given.names


def test_ids_say_nothing_of_the_text():
    tokenizer = documented.tokenizer()
    given = tokenizer(TEXTS[0], return_tensors="pt")
    attr = ffattr.attribute(tiny_models.build("bert", num_hidden_layers=1), given, tokenizer=tokenizer)
    assert attr.labels is None
    assert attr.names == attr.tokens
