"""Files of every kind give the same documents, whatever slices they are read in."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ffattr.corpus.documents import Failure, Source, find_sources, plan_shards, read_shard

TEXTS = ["one", "  two words ", "", "three", "vier äöü", "six", "seven"]
IDS = [f"d{number}" for number in range(len(TEXTS))]


def write(folder, kind):
    """Writes the texts as a file of this kind."""
    path = folder / f"texts{kind}"
    rows = "".join(json.dumps({"text": text, "id": one, "n": 1}) + "\n" for text, one in zip(TEXTS, IDS, strict=True))
    lines = {"txt": "\n".join(TEXTS), "jsonl": rows}
    table = pa.table({"id": IDS, "text": TEXTS})
    if kind == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif kind == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    else:
        content = lines[kind.split(".")[1]].encode()
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.rpartition(".")[2], bytes)
        path.write_bytes(pack(content))
    return str(path)


def read(path, shard_docs=3, text="text", id_column=None):
    sources = find_sources([path])
    shards = plan_shards(sources, shard_docs, text, id_column)
    return shards, [one for shard in shards for one in read_shard(sources[shard.source], shard, text, id_column)]


@pytest.mark.parametrize("shard_docs", [1, 3, 100])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".txt.gz", ".jsonl.zst", ".txt.zst", ".parquet", ".arrow"])
def test_every_kind_of_file(tmp_path, kind, shard_docs):
    id_column = None if ".txt" in kind else "id"
    shards, documents = read(write(tmp_path, kind), shard_docs, id_column=id_column)
    assert [document.row for document in documents] == list(range(len(TEXTS)))
    assert [document.text.strip() for document in documents] == [text.strip() for text in TEXTS]
    assert [document.id for document in documents] == ([None] * len(TEXTS) if id_column is None else IDS)
    assert [shard.count for shard in shards] == [min(shard_docs, 7 - first) for first in range(0, 7, shard_docs)]


def test_what_cannot_be_read_fails_alone(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n{"text": 3}\n{"text": \n[1]\n{"other": "b"}\n\xff\xfe\n{"text": "c"}\r\n'
    )
    _, documents = read(str(path))
    assert [document.text if isinstance(document.text, str) else document.text.kind for document in documents] == [
        *("a", "NotText", "JSONDecodeError", "NotText", "NotText", "UnicodeDecodeError", "c")
    ]
    assert documents[1].text == Failure("NotText", "a int in column 'text', expected text")


def test_bytes_in_parquet_that_are_no_text(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "t.parquet")
    _, documents = read(str(tmp_path / "t.parquet"))
    assert documents[0].text == "a"
    assert documents[1].text.kind == "UnicodeDecodeError"


def test_only_line_ends_end_a_text(tmp_path):
    (tmp_path / "t.txt").write_bytes("the cat\r\n sat\u2028on\x0cthe mat".encode())
    assert [document.text for document in read(str(tmp_path / "t.txt"))[1]] == ["the cat", "sat\u2028on\x0cthe mat"]


def test_folders_globs_and_each_file_once(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "deep/c.txt", ".hidden.txt", "notes.md"):
        (tmp_path / "in" / name).write_text('{"text": "x"}\n')
    found = find_sources([str(tmp_path / "in"), str(tmp_path / "in" / "*.txt")])
    assert [source.path.rpartition("/in/")[2] for source in found] == ["a.jsonl", "b.txt", "deep/c.txt"]
    assert {source.kind for source in found} == {"jsonl", "lines"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere.txt", FileNotFoundError, "no file 'nowhere.txt', and no file has a name like it"),
        ("*.none", FileNotFoundError, r"no file '\*.none'"),
        ("notes.md", ValueError, r"cannot tell what kind of documents 'notes.md' holds: expected .txt, .jsonl"),
        ("t.parquet.gz", ValueError, "cannot tell"),
        ("empty", FileNotFoundError, "the folder 'empty' holds no documents"),
    ],
)
def test_inputs_that_are_none(tmp_path, monkeypatch, given, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("notes.md", "t.parquet.gz"):
        (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        find_sources([given])


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".arrow"])
def test_a_missing_column_is_said_before_anything_is_planned(tmp_path, kind):
    with pytest.raises(ValueError, match=r"has no column 'body': it has .*text"):
        read(write(tmp_path, kind), text="body")
    with pytest.raises(ValueError, match="has no column 'key'"):
        read(write(tmp_path, kind), id_column="key")


def test_a_file_that_changed_and_one_that_is_empty(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a\nb\n")
    (source,) = find_sources([str(path)])
    (shard,) = plan_shards([source], 5, "text", None)
    path.write_text("a\n")
    with pytest.raises(ValueError, match="was changed since the run was planned"):
        read_shard(source, shard, "text", None)
    with pytest.raises(OSError, match="ends after row 1, where 2 more were planned"):
        read_shard(Source.from_path(str(path)), shard, "text", None)
    path.write_text("")
    with pytest.raises(ValueError, match="there is no document in"):
        read(str(path))
