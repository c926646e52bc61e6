"""``ffattr analyze`` and ``ffattr corpus`` hand on what was asked for."""

from pathlib import Path

import pytest
from commands import fails, run

from ffattr.cli import analyze, corpus


def test_corpus_passes_what_was_asked_for(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(corpus, "compute_corpus", lambda *given: bool(seen.append(given)) or len(seen) == 1)
    options = ["--workers", 2, "--rank", "0/3", "--keep", "documents,top:4", "--layers", "0,-1", "--scope", "atb"]
    options += ["--scope", "layer", "--pairs", 3, "--target", "predicted", "--long", "cut", "--max-errors", 5]
    result = run("corpus", "m", "a.txt", "b", "-o", tmp_path, *options)
    assert result.exit_code == 0, result.output
    (model, inputs, folder, engine, workers, rank, most, asked, as_json) = seen[0]
    assert not as_json
    assert (model, inputs, folder) == ("m", ["a.txt", "b"], Path(tmp_path))
    assert (engine, workers, rank, most) == ("local", 2, "0/3", "5")
    assert asked["keep"] == ("documents", "top:4", "scores")
    assert (asked["layers"], asked["scopes"], asked["pairs"]) == ("0,-1", ("atb", "layer"), 3)
    assert (asked["target"], asked["long"], asked["threads"]) == ("predicted", "cut", 1)
    assert run("corpus", "m", "a.txt", "-o", tmp_path).exit_code == 3  # some documents have errors
    assert seen[1][-2]["keep"] == ("documents", "pairs", "tokens")
    assert seen[1][-2]["scopes"] == ("layer",)


def test_a_plan_computes_nothing(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(corpus, "plan_corpus", lambda *given: seen.append(given))
    assert run("corpus", "m", "a.txt", "-o", tmp_path, "--plan").exit_code == 0
    assert [given[0] for given in seen] == ["m"]


@pytest.mark.parametrize(("options", "texts"), [([], 8), (["--detailed", 0], 0)])
def test_analyze_reads_a_corpus_or_files(monkeypatch, tmp_path, options, texts):
    seen = []
    monkeypatch.setattr(analyze, "analyze_files", lambda *given: seen.append(("files", *given)))
    monkeypatch.setattr(analyze, "analyze_corpus", lambda *given: seen.append(("corpus", *given)))
    assert run("analyze", tmp_path, "--picture", "svg", "--merge", *options).exit_code == 0
    assert run("analyze", "m", "--corpus", "t.txt", "--top", 4, "--rollout", "--long", "skip", *options).exit_code == 0
    output = Path("analysis")
    assert seen == [
        ("files", [str(tmp_path)], output, 50, None, ["svg"], texts, True, False),
        ("corpus", ["m"], Path("t.txt"), output, 4, None, ["png"], texts, True, "skip"),
    ]


def test_what_becomes_of_long_lines_is_for_a_corpus(tmp_path):
    fails(2, "--long skip goes with --corpus", "analyze", tmp_path, "--long", "skip")
    fails(
        2, "--long 'drop': expected one of error, skip, cut, window", "analyze", "m", "--corpus", "t", "--long", "drop"
    )


def test_numbers_below_their_least_are_refused(tmp_path):
    result = run("corpus", "m", "a.txt", "-o", tmp_path, "--pairs", 0)
    assert result.exit_code == 2
    fails(2, "--layers 'x': expected numbers", "corpus", "m", "a.txt", "-o", tmp_path, "--layers", "x")
