"""All analyses together: of maps, and of a corpus in one pass; what is written of them."""

import documented
import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, attribution
from tiny_models import build

import ffattr
from ffattr import Reduce, StackedAttribution, TopK, study
from ffattr.analysis import (
    alignment,
    amplified_pairs,
    cancellation,
    category_rates,
    contextualization_change,
    ff_energy,
    gain_balance,
    mixing_ratio,
    token_summary,
)

OF_MAPS = ["contextualization_change", "amplified_pairs", "amplified_categories", "token_summary", "alignment"]
OF_VECTORS = ["mixing_ratio", "cancellation", "norm_balance", "gain_balance"]


def test_a_corpus_in_one_pass_gives_what_its_maps_give(tiny, corpus, texts):
    """The maps of all texts, kept, and each analysis on its own."""
    assert list(corpus.frames) == [*OF_MAPS, *OF_VECTORS]
    assert corpus.left_out == {}
    model, tokenizer = tiny
    maps = ffattr.attribute(model, texts, tokenizer=tokenizer, scopes="all")
    change = corpus.frames["contextualization_change"].sort_values("layer", kind="stable", ignore_index=True)
    expected = contextualization_change(maps)
    pd.testing.assert_frame_equal(change[list(expected)], expected, atol=1e-9)
    assert set(change["standard_error"]) == {0.0}
    pairs = amplified_pairs(maps, 7)
    columns = ["layer", "rank", "batch", "query", "key"]
    pd.testing.assert_frame_equal(corpus.frames["amplified_pairs"][columns], pairs[columns])
    rates = category_rates(pairs, maps)
    pd.testing.assert_frame_equal(corpus.frames["amplified_categories"], rates, atol=1e-9)
    summary = corpus.frames["token_summary"]
    assert summary["text"].tolist() == [texts[batch] for batch in summary["batch"]]
    assert summary["line"].tolist() == [batch + 1 for batch in summary["batch"]]
    pd.testing.assert_frame_equal(summary.drop(columns=["line", "text"]), token_summary(maps), atol=1e-9)
    pd.testing.assert_frame_equal(corpus.frames["alignment"], alignment(maps), atol=1e-9)
    saved = study.of_maps("maps", maps, k=7)
    assert list(saved.frames) == OF_MAPS
    pd.testing.assert_frame_equal(saved.frames["amplified_categories"], rates)


def test_what_takes_vectors_is_of_the_first_texts(tiny, corpus, texts):
    model, tokenizer = tiny
    scopes = [scope for scope in POST_LN if scope.startswith("atb")]
    vectors = ffattr.vectors(model, texts[:2], tokenizer=tokenizer, scope=scopes)
    mixing = mixing_ratio(vectors["atb"])
    pd.testing.assert_frame_equal(corpus.frames["mixing_ratio"].drop(columns=["line", "text"]), mixing, atol=1e-9)
    found = corpus.frames["cancellation"]
    together = list(vectors.values())
    by_energy = cancellation(together, order="ff", scores=ff_energy(together))
    gains = torch.stack([layer.output.LayerNorm.weight.detach() for layer in model.encoder.layer])
    by_gain = cancellation(together, order="gain", scores=-gains.abs())
    for expected in (by_energy, by_gain):
        one = found[found["order"] == expected["order"][0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(one, expected, atol=1e-9)
    balance = gain_balance(together, gains)
    pd.testing.assert_frame_equal(corpus.frames["gain_balance"], balance, atol=1e-9)


def test_a_causal_model_with_its_norms_before(texts):
    """No norm after the feed-forward block: the gain is that of the one before it."""
    found = study.of_model("tiny", build("gpt2"), texts[:1], documented.tokenizer(), detailed=1, rolled=True)
    assert found.left_out == {}
    assert set(found.frames["contextualization_change"]["component"]) == {"FF", "RES", "LN", "FF block"}
    assert set(found.frames["cancellation"]["order"]) == {"ff", "gain", "random"}
    after = found.frames["rollout"].query("key > query")
    assert (after["share"] == 0).all()


def test_what_cannot_be_said_is_left_out_with_the_reason(tmp_path):
    found = study.of_maps("last", attribution(("attn", "atb_ff_res_ln"), layers=(0, 1, 2)), rolled=True)
    assert list(found.frames) == ["token_summary", "rollout"]
    assert "no two neighbouring scopes" in found.left_out["contextualization_change"]
    study.write([found], tmp_path)
    assert "## Left out\n\n- last, contextualization change: no two" in (tmp_path / "tables.md").read_text()
    gap = study.of_maps("gap", attribution(POST_LN, layers=(0, 2)), rolled=True)
    assert "rollout" not in gap.frames
    with pytest.raises(ValueError, match="nothing can be said of top: "):
        study.of_maps("top", kept(TopK(2), some(("atb", "atb_ff"))))
    with pytest.raises(ValueError, match="nothing can be said of none: "):
        study.of_maps("none", kept(Reduce(lambda rows: None), some(("atb", "atb_ff"))))


def test_maps_and_models_of_two_stacks_are_refused(tiny, texts):
    both = StackedAttribution.of({"encoder": attribution(), "decoder": attribution(causal=True)})
    with pytest.raises(ValueError, match=r"attr\.stacks\[name\], for encoder, decoder"):
        study.of_maps("both", both)
    with pytest.raises(ValueError, match="both has an encoder and a decoder"):
        study.of_model("both", build("bart"), texts, tiny[1])
    with pytest.raises(ValueError, match="the corpus has no text"):
        study.of_model("none", tiny[0], [], tiny[1])


def test_long_maps_are_not_drawn_or_rolled_out(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=600, real=(600,), layers=(0,))
    found = study.of_maps("long", attr, rolled=True)
    assert "600 tokens are too many" in found.left_out["rollout"]
    assert not any(path.name.startswith("scopes") for path in study.write([found], tmp_path))


def test_a_parallel_block(tmp_path, texts):
    """Its feed-forward network brings nothing to other tokens: there is no pair that it amplifies."""
    found = study.of_model("phi", build("phi"), texts[:1], documented.tokenizer(), detailed=1)
    assert "mixing_ratio" in found.frames
    assert list(found.left_out) == ["amplified_pairs"]
    assert "no pair of different tokens" in found.left_out["amplified_pairs"]
    assert tmp_path / "scopes.png" in study.write([found], tmp_path)


def test_norms_within_the_blocks(texts):
    """All of OLMo 2's feed-forward block ends with the residual connection; a post-LN layer's never does."""
    found = study.of_model("olmo2", build("olmo2"), texts[:1], documented.tokenizer(), detailed=0)
    change = found.frames["contextualization_change"].query("layer == 0")
    steps = change[["component", "before", "after"]].values.tolist()
    assert steps[-1] == ["FF block", "atb", "atb_ff_res"]
    post = study.of_maps("post", attribution(POST_LN[:-1], layers=(0,)))
    assert list(post.frames["contextualization_change"]["component"]) == ["FF", "RES"]


def test_a_text_of_one_token_is_written(tmp_path, tiny):
    found = study.of_maps("one", ffattr.attribute(tiny[0], torch.tensor([[4]]), tokenizer=tiny[1], scopes="all"))
    assert "no pair of different tokens" in found.left_out["amplified_pairs"]
    names = {path.name for path in study.write([found], tmp_path)}
    assert "contextualization_change.png" in names
    assert "scopes.png" not in names


def test_layers_are_named_once():
    with pytest.raises(ValueError, match=r"twice has the layers \[1, 1\], expected each once"):
        study.of_maps("twice", attribution(layers=(1, 1)))


def test_options_are_those_of_vectors_too(tiny, texts):
    """The vectors are of the same layers, queries and Integrated Gradients as the maps."""
    model, tokenizer = tiny
    options = {"layers": [1], "queries": [1, 2], "ig": ffattr.Riemann(2, "left")}
    found = study.of_model("tiny", model, texts, tokenizer, detailed=3, **options)
    whole = found.frames["cancellation"].query("order == 'ff' and removed == 0")
    change = found.frames["contextualization_change"]
    assert set(found.frames["mixing_ratio"]["query"]) == {1, 2}
    assert whole["layer"].tolist() == change["layer"].tolist() == [1] * 4
    assert whole["value"].tolist() == pytest.approx(change["value"].tolist(), abs=1e-9)


def test_vectors_that_do_not_fit_leave_the_rest(tiny, monkeypatch, texts):
    def vectors(*arguments, **options):
        raise ValueError("the vectors would take 9 GiB")

    monkeypatch.setattr(study.frames, "vectors", vectors)
    found = study.of_model("tiny", tiny[0], texts[:1], tiny[1])
    assert list(found.frames) == OF_MAPS
    assert list(found.left_out) == OF_VECTORS
    assert found.left_out["cancellation"] == "the vectors would take 9 GiB; or take fewer texts (detailed)"


def test_the_text_that_was_rolled_out_and_the_one_that_is_too_long(tiny, texts):
    model, tokenizer = tiny
    found = study.of_model(
        "tiny", model, texts, tokenizer, detailed=0, rolled=True
    )  # the last is nearest to 100 characters
    frame = found.frames["rollout"]
    assert set(frame["batch"]) == {2}
    assert frame.query("query == 2")["query_token"].iloc[0] == "bird"
    assert set(frame["line"]) == {3}
    assert set(frame["text"]) == {texts[2]}
    with pytest.raises(ValueError, match=r"text 2 \('the the .* has 102 tokens, but tiny has \d+ learned positions"):
        study.of_model("tiny", model, [texts[0], "the " * 100], tokenizer)


def test_bad_texts_can_be_skipped_with_a_record(tiny, texts):
    model, tokenizer = tiny
    given = ["", texts[0], "the " * 100, texts[1]]
    found = study.of_model("tiny", model, given, tokenizer, k=3, detailed=1, on_error="skip")
    assert found.frames["errors"][["line", "error_type"]].values.tolist() == [[1, "EmptyText"], [3, "TooLong"]]
    assert "has 102 tokens" in found.frames["errors"]["error"][1]
    assert set(found.frames["token_summary"]["line"]) == {2, 4}  # as they were given
    good = study.of_model("tiny", model, [texts[0], texts[1]], tokenizer, k=3, detailed=1)
    for name, frame in good.frames.items():
        other = found.frames[name]
        pd.testing.assert_frame_equal(
            other.drop(columns="line", errors="ignore"), frame.drop(columns="line", errors="ignore")
        )
    with pytest.raises(ValueError, match="text 1 is empty: leave it out, or say on_error='skip'"):
        study.of_model("tiny", model, given, tokenizer)
    with pytest.raises(ValueError, match="none of 2 texts can be read, the first of them: text 1 is empty"):
        study.of_model("tiny", model, ["", " "], tokenizer, on_error="skip")
    with pytest.raises(ValueError, match="on_error='ignore'"):
        study.of_model("tiny", model, given, tokenizer, on_error="ignore")


def test_examples_are_added_to_what_was_found_elsewhere(tiny, corpus, texts):
    found = study.Study("tiny")
    study.add_examples(found, tiny[0], texts, tokenizer=tiny[1], detailed=2)
    assert list(found.frames) == ["alignment", *OF_VECTORS]
    of_two = study.of_model("tiny", tiny[0], texts[:2], tiny[1], detailed=0).frames["alignment"]
    pd.testing.assert_frame_equal(found.frames.pop("alignment"), of_two)
    for name, frame in found.frames.items():
        pd.testing.assert_frame_equal(frame, corpus.frames[name])
    assert found.example.tokens == corpus.example.tokens
