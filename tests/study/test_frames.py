"""All analyses together: of maps, and of a corpus in one pass; what is written of them."""

import math

import documented
import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution
from tiny_models import build

import ffattr
from ffattr import Reduce, StackedAttribution, TopK, study
from ffattr.analysis import (
    amplified_pairs,
    cancellation,
    category_rates,
    contextualization_change,
    ff_energy,
    mixing_ratio,
    token_summary,
)

TEXTS = ["The cat sat on the mat.", "Dogs barking.", "A bird saw two dogs, and the cat sat."]
OF_MAPS = ["contextualization_change", "amplified_pairs", "amplified_categories", "token_summary", "rollout"]
OF_VECTORS = ["mixing_ratio", "cancellation", "norm_balance"]


@pytest.fixture(scope="module")
def tiny():
    return documented.namespace()["model"], documented.namespace()["tokenizer"]


@pytest.fixture(scope="module")
def corpus(tiny):
    return study.of_model("tiny", tiny[0], TEXTS, tiny[1], k=7, detailed=2)


def test_a_corpus_in_one_pass_gives_what_its_maps_give(tiny, corpus):
    """The maps of all texts, kept, and each analysis on its own."""
    assert list(corpus.frames) == [*OF_MAPS, *OF_VECTORS]
    assert corpus.left_out == {}
    model, tokenizer = tiny
    maps = ffattr.attribute(model, TEXTS, tokenizer=tokenizer, scopes="all")
    change = corpus.frames["contextualization_change"].sort_values("layer", kind="stable", ignore_index=True)
    expected = contextualization_change(maps)
    pd.testing.assert_frame_equal(change[list(expected)], expected, atol=1e-9)
    assert set(change["standard_error"]) == {0.0}
    pairs = amplified_pairs(maps, 7)
    columns = ["layer", "rank", "batch", "query", "key"]
    pd.testing.assert_frame_equal(corpus.frames["amplified_pairs"][columns], pairs[columns])
    rates = category_rates(pairs, maps)
    pd.testing.assert_frame_equal(corpus.frames["amplified_categories"], rates, atol=1e-9)
    pd.testing.assert_frame_equal(corpus.frames["token_summary"], token_summary(maps), atol=1e-9)
    saved = study.of_maps("maps", maps, k=7)
    assert list(saved.frames) == OF_MAPS
    pd.testing.assert_frame_equal(saved.frames["amplified_categories"], rates)


def test_what_takes_vectors_is_of_the_first_texts(tiny, corpus):
    model, tokenizer = tiny
    scopes = [scope for scope in POST_LN if scope.startswith("atb")]
    vectors = ffattr.vectors(model, TEXTS[:2], tokenizer=tokenizer, scope=scopes)
    mixing = mixing_ratio(vectors["atb"])
    pd.testing.assert_frame_equal(corpus.frames["mixing_ratio"], mixing, atol=1e-9)
    found = corpus.frames["cancellation"]
    together = list(vectors.values())
    by_energy = cancellation(together, order="ff", scores=ff_energy(together))
    gains = torch.stack([layer.output.LayerNorm.weight.detach() for layer in model.encoder.layer])
    by_gain = cancellation(together, order="gain", scores=-gains.abs())
    for expected in (by_energy, by_gain):
        one = found[found["order"] == expected["order"][0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(one, expected, atol=1e-9)


def test_a_causal_model_with_its_norms_before():
    """No norm after the feed-forward block: the gain is that of the one before it."""
    found = study.of_model("tiny", build("gpt2"), TEXTS[:1], documented.tokenizer(), detailed=1)
    assert found.left_out == {}
    assert set(found.frames["contextualization_change"]["component"]) == {"FF", "RES", "LN", "FF block"}
    assert set(found.frames["cancellation"]["order"]) == {"ff", "gain", "random"}
    after = found.frames["rollout"].query("key > query")
    assert (after["share"] == 0).all()


def test_what_cannot_be_said_is_left_out_with_the_reason(tmp_path):
    found = study.of_maps("last", attribution(("attn", "atb_ff_res_ln"), layers=(0, 1, 2)))
    assert list(found.frames) == ["token_summary", "rollout"]
    assert "no two neighbouring scopes" in found.left_out["contextualization_change"]
    study.write([found], tmp_path)
    assert "## Left out\n\n- last, contextualization change: no two" in (tmp_path / "tables.md").read_text()
    gap = study.of_maps("gap", attribution(POST_LN, layers=(0, 2)))
    assert "rollout" not in gap.frames
    with pytest.raises(ValueError, match="nothing can be said of top: "):
        study.of_maps("top", kept(TopK(2), some(("atb", "atb_ff"))))
    with pytest.raises(ValueError, match="nothing can be said of none: "):
        study.of_maps("none", kept(Reduce(lambda rows: None), some(("atb", "atb_ff"))))


def test_maps_and_models_of_two_stacks_are_refused(tiny):
    both = StackedAttribution.of({"encoder": attribution(), "decoder": attribution(causal=True)})
    with pytest.raises(ValueError, match=r"attr\.stacks\[name\], for encoder, decoder"):
        study.of_maps("both", both)
    with pytest.raises(ValueError, match="both has an encoder and a decoder"):
        study.of_model("both", build("bart"), TEXTS, tiny[1])
    with pytest.raises(ValueError, match="the corpus has no text"):
        study.of_model("none", tiny[0], [], tiny[1])


def test_everything_is_written(tmp_path, corpus):
    files = study.write([corpus], tmp_path / "new" / "folder", ["png", "svg"])
    assert all(path.stat().st_size for path in files)
    names = {path.name for path in files}
    assert names == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert {f"{name}.csv" for name in [*OF_MAPS, *OF_VECTORS]} <= names
    pictures = ["contextualization_change", "amplified_categories", "cancellation", "scopes", "amplification"]
    assert {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} <= names
    for name, frame in corpus.frames.items():
        read = pd.read_csv(tmp_path / "new" / "folder" / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert list(read) == ["model", *frame]
        assert set(read["model"]) == {"tiny"}
        number = next(column for column in frame if frame[column].dtype == float)
        assert read[number].tolist() == pytest.approx(frame[number].tolist(), nan_ok=True)


def test_the_tables_say_what_the_frames_say(tmp_path, corpus):
    study.write([corpus], tmp_path, [])
    text = (tmp_path / "tables.md").read_text()
    change = corpus.frames["contextualization_change"].query("layer == 1")
    row = " | ".join(f"{change[change.component == name]['value'].item():.3f}" for name in ("FF", "RES", "LN"))
    assert f"| 1 | {row} |" in text
    rates = corpus.frames["amplified_categories"].query("category == 'adjacent'")[["share", "base_rate"]].mean()
    lift = rates.share / rates.base_rate
    assert f"| adjacent | {rates.share:.3f} | {rates.base_rate:.3f} | {lift:.3f} |" in text
    first = corpus.frames["amplified_pairs"].iloc[0]
    assert f"| 0 | {first.query_token} ← {first.key_token}" in text
    assert text.count("\n## ") == 6


def test_several_models_stand_side_by_side(tmp_path, corpus):
    other = study.of_maps("other", attribution(PRE_LN, layers=(0, 1), causal=True))
    files = {path.name for path in study.write([corpus, other], tmp_path)}
    assert {"scopes_tiny.png", "scopes_other.png", "cancellation_tiny.png", "contextualization_change.png"} <= files
    change = pd.read_csv(tmp_path / "contextualization_change.csv")
    assert change.groupby("model").size().to_dict() == {"tiny": 12, "other": 8}
    assert math.isnan(change.query("model == 'other'")["pairs"].iloc[0])


def test_tokens_cannot_break_a_table(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=4, real=(4, 4), layers=(0,))
    attr.tokens = [["a|b", "line\n\r\u2028break", "<script>\ud800", "\\"]] * 2
    study.write([study.of_maps("odd", attr)], tmp_path, [])
    text = (tmp_path / "tables.md").read_text()
    assert "<script>" not in text
    assert "a\\|b" in text
    (row,) = [line for line in text.splitlines() if "←" in line and line.startswith("| 0")]
    assert row.replace("\\|", "").count("|") == 3


def test_what_is_not_written(tmp_path, corpus):
    with pytest.raises(ValueError, match="unknown format 'gif', expected some of png, svg, pdf"):
        study.write([corpus], tmp_path / "x", ["gif"])
    with pytest.raises(ValueError, match="each by a name of its own"):
        study.write([corpus, corpus], tmp_path / "x")
    with pytest.raises(ValueError, match="each by a name of its own"):  # in file names, that is
        study.write([study.Study("a/b", corpus.frames), study.Study("a-b", corpus.frames)], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        study.write([corpus], tmp_path / "file")


def test_long_maps_are_not_drawn_or_rolled_out(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=600, real=(600,), layers=(0,))
    found = study.of_maps("long", attr)
    assert "600 tokens are too many" in found.left_out["rollout"]
    assert not any(path.name.startswith("scopes") for path in study.write([found], tmp_path))


def test_a_parallel_block(tmp_path):
    """Its feed-forward network brings nothing to other tokens: there is no pair that it amplifies."""
    found = study.of_model("phi", build("phi"), TEXTS[:1], documented.tokenizer(), detailed=1)
    assert "mixing_ratio" in found.frames
    assert list(found.left_out) == ["amplified_pairs"]
    assert "no pair of different tokens" in found.left_out["amplified_pairs"]
    assert tmp_path / "scopes.png" in study.write([found], tmp_path)


def test_norms_within_the_blocks():
    """All of OLMo 2's feed-forward block ends with the residual connection; a post-LN layer's never does."""
    found = study.of_model("olmo2", build("olmo2"), TEXTS[:1], documented.tokenizer(), detailed=0)
    change = found.frames["contextualization_change"].query("layer == 0")
    steps = change[["component", "before", "after"]].values.tolist()
    assert steps[-1] == ["FF block", "atb", "atb_ff_res"]
    post = study.of_maps("post", attribution(POST_LN[:-1], layers=(0,)))
    assert list(post.frames["contextualization_change"]["component"]) == ["FF", "RES"]


@pytest.mark.parametrize(
    ("scopes", "pictures"),
    [
        (("atb", "atb_ff_res_ln"), {"contextualization_change.png", "scopes.png"}),
        (("atb_ff", "atb_ff_res"), {"contextualization_change.png", "scopes.png"}),
        (("atb",), set()),  # which is the last scope too, and rolled out once
    ],
)
def test_maps_of_some_scopes_are_written(tmp_path, scopes, pictures):
    found = study.of_maps("some", attribution(scopes, layers=(0, 1)))
    study.write([found], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert not found.frames["rollout"].duplicated(["scope", "layer", "batch", "query", "key"]).any()


def test_a_text_of_one_token_is_written(tmp_path, tiny):
    found = study.of_maps("one", ffattr.attribute(tiny[0], torch.tensor([[4]]), tokenizer=tiny[1], scopes="all"))
    assert "no pair of different tokens" in found.left_out["amplified_pairs"]
    names = {path.name for path in study.write([found], tmp_path)}
    assert "contextualization_change.png" in names
    assert "scopes.png" not in names


def test_layers_are_named_once():
    with pytest.raises(ValueError, match=r"twice has the layers \[1, 1\], expected each once"):
        study.of_maps("twice", attribution(layers=(1, 1)))


def test_options_are_those_of_vectors_too(tiny):
    """The vectors are of the same layers, queries and Integrated Gradients as the maps."""
    model, tokenizer = tiny
    options = {"layers": [1], "queries": [1, 2], "ig": ffattr.Riemann(2, "left")}
    found = study.of_model("tiny", model, TEXTS, tokenizer, detailed=3, **options)
    whole = found.frames["cancellation"].query("order == 'ff' and removed == 0")
    change = found.frames["contextualization_change"]
    assert set(found.frames["mixing_ratio"]["query"]) == {1, 2}
    assert whole["layer"].tolist() == change["layer"].tolist() == [1] * 4
    assert whole["value"].tolist() == pytest.approx(change["value"].tolist(), abs=1e-9)


def test_vectors_that_do_not_fit_leave_the_rest(tiny, monkeypatch):
    def vectors(*arguments, **options):
        raise ValueError("the vectors would take 9 GiB")

    monkeypatch.setattr(study.frames, "vectors", vectors)
    found = study.of_model("tiny", tiny[0], TEXTS[:1], tiny[1])
    assert list(found.frames) == OF_MAPS
    assert list(found.left_out) == OF_VECTORS
    assert found.left_out["cancellation"] == "the vectors would take 9 GiB; or take fewer texts (detailed)"


def test_the_text_that_was_rolled_out_and_the_one_that_is_too_long(tiny):
    model, tokenizer = tiny
    found = study.of_model("tiny", model, TEXTS, tokenizer, detailed=0)  # the last is nearest to 100 characters
    frame = found.frames["rollout"]
    assert set(frame["batch"]) == {2}
    assert frame.query("query == 2")["query_token"].iloc[0] == "bird"
    with pytest.raises(ValueError, match=r"text 1 \('the the .* has 102 tokens, but tiny has \d+ learned positions"):
        study.of_model("tiny", model, [TEXTS[0], "the " * 100], tokenizer)


def test_a_folder_that_cannot_be_written_to_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file/x': .*file' is a file, expected a folder"):
        study.check(tmp_path / "file" / "x", ["png"])
    study.check(tmp_path / "new" / "folder", ["png", "pdf"])
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_with_the_file(tmp_path, corpus, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study.files, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write '.*contextualization_change\.csv': No space left on device"):
        study.write([corpus], tmp_path)
