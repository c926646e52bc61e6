"""Everything on docs/corpora.md runs as it stands there; what takes Ray does so in tests/corpus/test_on_ray.py.

Its commands run in this process, where they name no engine: that processes give the same bytes has tests of its own.
"""

import os

import corpora
import pytest
import torch
from commands import run
from corpora_page import PAGE, find_block, list_commands, make_surroundings

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq

from ffattr.corpus import read_run
from ffattr.corpus.tables import Layout, list_parts
from ffattr.engine import machine_rates


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("page"), os.getcwd()
    make_surroundings(folder)
    threads = torch.get_num_threads()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)
    machine_rates.pin(None)


@pytest.fixture(scope="module")
def commands(surroundings):
    """Runs the ten commands, in the order of the page, and returns what each said."""
    said = []
    for arguments in list_commands():
        if "ray" not in arguments:
            result = run(*arguments, *(["--engine", "here"] if arguments[0] == "corpus" else []))
            assert result.exit_code == 0, (arguments, result.output)
            said.append(result.stdout)
    return said


def test_the_ten_commands(commands, surroundings):
    assert len(list_commands()) == 10
    assert "10 documents" in commands[0]
    assert commands[0] == commands[1]
    assert "8 documents" in commands[2]
    assert "10 documents in 1 files" in commands[3]
    assert not (surroundings / "planned").exists()
    assert "analysis/pairs-00000.parquet" in commands[-1]
    assert read_run(surroundings / "pairs").options.threads == 2
    assert corpora.read_tree(surroundings / "shared") == corpora.read_tree(surroundings / "run")


def test_every_column_is_explained(commands, surroundings):
    layout = None
    for folder, table in (("run", "documents"), ("run", "pairs"), ("run", "tokens"), ("largest", "top")):
        schema = pq.read_schema(list_parts(surroundings / folder, table)[0])
        layout = layout or Layout.from_schema(schema)
        about = PAGE[PAGE.index(f"**{table}**") :].split("\n\n**", 1)[0] + PAGE[PAGE.index("**documents**") :]
        categories = {*layout.categories, *(f"all_{name}" for name in layout.categories)}
        missing = [name for name in schema.names if f"`{name}`" not in about and name not in categories]
        assert missing == []


@pytest.mark.usefixtures("commands")
def test_the_query_in_pandas(capsys):
    exec(find_block("python", "read_parquet"), {})
    said = capsys.readouterr().out
    assert "token" in said
    assert "mean" in said


@pytest.mark.usefixtures("commands")
def test_the_query_in_duckdb():
    duckdb = pytest.importorskip("duckdb", reason="the query of the page takes DuckDB")
    found = duckdb.sql(find_block("sql", "documents")).fetchall()
    assert 10 < len(found) <= 20
    assert all(isinstance(row[-1], float) for row in found)


def test_the_mapper_in_datasets(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    pytest.importorskip("datasets", reason="the example of the page takes Hugging Face's datasets")
    names = {}
    exec(find_block("python", "import datasets"), names)
    found = names["found"]
    assert found.num_rows == 4
    assert found.with_format(None)[1]["pairs"][0]["rank"] == 1
    assert {"id", "tokens", "change_ff", "error_type"} <= set(found.column_names)
    assert "body" not in found.column_names
    assert int(capsys.readouterr().out.split()[-1]) == sum(found.with_format(None)["token_count"]) > 20
