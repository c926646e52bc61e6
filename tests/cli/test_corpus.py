"""``ffattr corpus``: exit codes, what is said, and how far it is."""

import io

import corpora
import pytest
from commands import fails, run
from rich.console import Console

pytest.importorskip("pyarrow")

from ffattr.cli.corpus import require_corpus, show_count
from ffattr.corpus import Count


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return corpora.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"body": "the cat sat", "key": 7}\n{"body": "a dog", "key": 8}\n')
    return tmp_path / "texts.jsonl"


def test_a_corpus_and_its_analysis(model, texts, tmp_path):
    options = ["--engine", "here", "--text", "body", "--id", "key", "--keep", "documents,pairs,top:2", "--pairs", 50]
    planned = run("corpus", model, texts, "-o", tmp_path / "out", *options, "--plan")
    assert planned.exit_code == 0, planned.output
    assert "2 documents in 1 files" in planned.stdout
    assert not (tmp_path / "out").exists()
    result = run("corpus", model, texts, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "2 documents, 9 tokens" in result.stdout
    assert [row["id"] for row in corpora.read_documents(tmp_path / "out")] == ["7", "8"]
    result = run("analyze", tmp_path / "out", "-o", tmp_path / "an", "--merge")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "an").iterdir()}
    assert {"tables.md", "amplified_pairs.csv", "cancellation.csv", "scopes.png", "pairs-00000.parquet"} <= names
    assert (tmp_path / "an" / "tables.md").read_text().startswith("# out\n")
    fails(2, "holds another run: options.pairs was 50", "corpus", model, texts, "-o", tmp_path / "out", *options[:-2])


def test_errors_have_a_code_of_their_own(model, tmp_path):
    (tmp_path / "t.txt").write_text("the cat\n\n" + "the " * 40)
    result = run("corpus", model, tmp_path / "t.txt", "-o", tmp_path / "out", "--engine", "here")
    assert result.exit_code == 3, result.output
    assert "errors: 2 documents, 1 of them empty: column 'error' of" in result.stdout
    assert run("corpus", model, tmp_path / "t.txt", "-o", tmp_path / "out", "--engine", "here").exit_code == 3
    again = ["corpus", model, tmp_path / "t.txt", "-o", tmp_path / "cut", "--engine", "here", "--long", "cut"]
    assert run(*again).exit_code == 3
    assert [row["error_type"] for row in corpora.read_documents(tmp_path / "cut")] == [None, "EmptyText", None]


def test_a_target_gives_scores(tmp_path):
    import pyarrow.parquet as pq

    model = corpora.save_model(tmp_path / "model", head="ForSequenceClassification", num_labels=2)
    (tmp_path / "t.txt").write_text("the cat\na dog saw it\n")
    options = ["--engine", "here", "--keep", "documents", "--target", 1]
    result = run("corpus", model, tmp_path / "t.txt", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    (part,) = (tmp_path / "out").glob("scores/*/*.parquet")
    rows = pq.ParquetFile(part).read().to_pylist()
    assert [row["token"] for row in rows if row["row"] == 0] == ["[CLS]", "the", "cat", "[SEP]", "(bias)"]
    assert {row["target"] for row in rows} == {"LABEL_1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "2/2"], "rank 2/2: expected I/N with I from 0 to N - 1"),
        (["--keep", "maps,all"], "unknown table 'all'"),
        (["--layers", "a"], "--layers 'a': expected numbers"),
        (["--max-errors", "few"], "max_errors is 'few'"),
        (["--text", "title"], "has no column 'title': it has body, key"),
        (["--engine", "spark"], "--engine 'spark': expected one of local, ray, here"),
    ],
)
def test_wrong_usage(model, texts, tmp_path, options, message):
    options = ["--text", "body", "--engine", "here", *options]
    fails(2, message, "corpus", model, texts, "-o", tmp_path / "out", *options)


def test_too_many_errors(model, tmp_path):
    (tmp_path / "t.txt").write_text("the " * 40)
    options = ["--engine", "here", "--max-errors", "0"]
    fails(1, "more than max_errors=0 allows", "corpus", model, tmp_path / "t.txt", "-o", tmp_path / "out", *options)


def test_how_far_it_is(monkeypatch):
    """A line a minute where there is no terminal."""
    now = [0.0]
    monkeypatch.setattr("ffattr.cli.corpus.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    with show_count(console) as tell:
        for second in range(0, 150, 10):
            now[0] = float(second)
            tell(Count(100, documents=second // 2, tokens=second * 20, errors=1))
    assert console.file.getvalue().splitlines() == [
        "30 of 100 documents, 0:02:20 left, 0.5 documents/s, 20 tokens/s, 1 errors",
        "60 of 100 documents, 0:01:20 left, 0.5 documents/s, 20 tokens/s, 1 errors",
    ]


def test_what_is_missing_is_said(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments):
        if name == "" and "corpus" in (arguments[2] or ()):
            raise ModuleNotFoundError("No module named 'pyarrow.lib'", name="pyarrow.lib")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"a corpus needs pyarrow.lib: pip install 'ffattr\[corpus\]'"):
        require_corpus()
