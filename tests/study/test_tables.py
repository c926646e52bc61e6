"""Frames as Markdown."""

import math
import re

import pandas as pd
from synthetic import attribution

from ffattr import study
from ffattr.study.frames import Study
from ffattr.study.tables import write_tables


def test_the_tables_say_what_the_frames_say(tmp_path, corpus):
    study.write([corpus], tmp_path, [])
    text = (tmp_path / "tables.md").read_text()
    change = corpus.frames["contextualization_change"].query("layer == 1")
    rows = [change[change.component == name].iloc[0] for name in ("FF", "RES", "LN")]
    row = " | ".join(f"{one['value']:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in rows)
    assert f"| 1 | {row} |" in text
    rates = corpus.frames["amplified_categories"].query("category == 'adjacent'")[["share", "base_rate"]].mean()
    lift = rates.share / rates.base_rate
    assert f"| neighbouring words | {rates.share:.3f} | {rates.base_rate:.3f} | {lift:.3f} |" in text
    first = corpus.frames["amplified_pairs"].iloc[0]
    assert f"| 0 | {first.query_token} ← {first.key_token}" in text
    assert text.count("\n## ") == 8


def test_tokens_cannot_break_a_table(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=4, real=(4, 4), layers=(0,))
    attr.tokens = [["a|b", "line\n\r\u2028break", "<script>", "\\"]] * 2
    study.write([study.of_maps("odd", attr)], tmp_path, [])
    text = (tmp_path / "tables.md").read_text()
    assert "<script>" not in text.replace("\\<", "")
    assert "a\\|b" in text
    (row,) = [line for line in text.splitlines() if "←" in line and line.startswith("| 0")]
    assert row.replace("\\|", "").count("|") == 3


def lines(frames, *studies):
    """Of the document, those that are not empty."""
    return [line for line in "".join(write_tables(frames, studies)).splitlines() if line]


def test_changes_have_a_column_for_each_component():
    frame = pd.DataFrame(
        {
            "model": "tiny",
            "layer": [3, 3, 0, 0],  # in the order in which they came
            "component": ["RES", "FF", "RES", "FF"],
            "value": [0.125, 0.5, 1.0, math.nan],
        }
    )
    assert lines({"contextualization_change": frame}, Study("tiny")) == [
        "# tiny",
        "## Contextualization change, 1 - Spearman's rho [95 % of draws of sentences]",
        "| layer | RES | FF |",
        "| --- | --- | --- |",
        "| 0 | 1.000 | nan |",
        "| 3 | 0.125 | 0.500 |",
    ]


def test_what_is_not_defined_has_its_place():
    """A component in all layers, a layer in all components; both of a text of one token."""
    rows = [(layer, component) for layer in (0, 1) for component in ("LN", "FF")]
    frame = pd.DataFrame(rows, columns=["layer", "component"]).assign(
        model="tiny", value=[0.5, math.nan] + [math.nan] * 2
    )
    *_, first, second = lines({"contextualization_change": frame}, Study("tiny"))
    assert (first, second) == ("| 0 | 0.500 | nan |", "| 1 | nan | nan |")
    *_, first, second = lines({"contextualization_change": frame.assign(value=math.nan)}, Study("tiny"))
    assert (first, second) == ("| 0 | nan | nan |", "| 1 | nan | nan |")
    removed = frame.assign(order="gain", removed=frame["layer"] * 8)
    *_, first, second = lines({"cancellation": removed}, Study("tiny"))
    assert (first, second) == ("| gain | LN | 0.500 | nan |", "| gain | FF | nan | nan |")


def test_pairs_that_read_alike_are_named_once():
    pairs = [("Ġthe", "Ġcat"), ("the", "▁cat"), ("a", "b"), *((str(number), "x") for number in range(20))]
    frame = pd.DataFrame(pairs, columns=["query_token", "key_token"]).assign(model="tiny", layer=0)
    *_, row = lines({"amplified_pairs": frame}, Study("tiny"))
    named = ["the ← cat (2 times)", "a ← b", *(f"{number} ← x" for number in range(8))]
    assert row == f"| 0 | {', '.join(named)} |"


def test_means_over_layers_and_the_lift_of_their_means():
    frame = pd.DataFrame(
        {
            "model": "tiny",
            "layer": [0, 0, 1, 1],
            "category": ["subwords", "other", "subwords", "other"],
            "share": [0.5, 0.0, 0.25, 0.5],
            "base_rate": [0.25, 0.0, 0.25, 0.0],
            "lift": [2.0, math.nan, 1.0, math.nan],
        }
    )
    assert lines({"amplified_categories": frame}, Study("tiny"))[-2:] == [
        "| pieces of one word | 0.375 | 0.250 | 1.500 |",
        "| none of these | 0.250 | 0.000 | inf |",
    ]


def test_tables_of_several_models_are_named_in_their_order():
    frame = pd.DataFrame({"model": ["b", "b", "a"], "layer": [0, 0, 0], "ratio": [1.0, 2.0, 0.5]})
    text = lines({"mixing_ratio": frame}, Study("b"), Study("a", left_out={"norm_balance": "too long"}))
    assert text == [
        "# b, a",
        "## Context-mixing ratio after the attention block",
        "b",
        "| layer | ratio |",
        "| --- | --- |",
        "| 0 | 1.500 |",
        "a",
        "| layer | ratio |",
        "| --- | --- |",
        "| 0 | 0.500 |",
        "## Left out",
        "- a, norm balance: too long",
    ]


def test_frames_without_a_rule_are_in_no_table():
    assert lines({"token_summary": pd.DataFrame({"model": ["tiny"], "norm": [1.0]})}, Study("tiny")) == ["# tiny"]


def test_tokens_are_no_markdown(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=4, real=(4, 4), layers=(0,))
    attr.tokens = [["![x](http://a.b/c.png)", "[y](https://a.b)", "**bold**", "www.a.b"]] * 2
    study.write([study.of_maps("o*d*d_", attr)], tmp_path, [])
    text = (tmp_path / "tables.md").read_text()
    assert text.startswith("# o\\*d\\*d\\_\n")
    assert re.search(r"(?<!\\)\]\(", text) is None
    for link in ("http://", "https://", "**", "www."):
        assert link not in text
    assert r"![x\](http\://a.b/c.png)" in text
    assert r"www\.a.b" in text
