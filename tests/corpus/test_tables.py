"""Columns, their order and their encodings; parts in folders of a thousand."""

import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from ffattr.corpus.documents import Document, Failure
from ffattr.corpus.measure import Parts, PieceNumbers
from ffattr.corpus.tables import Layout, list_parts, make_tables, name_change, part_path, write_table

LAYOUT = Layout.from_keep(
    ("pairs", "top:2"),
    scopes=("atb",),
    layers=(0, 3),
    components=(("FF", "atb", "atb_ff"), ("FF block", "atb", "atb_ff_res")),
    categories=("subwords", "other"),
)


def numbers(row, window, change, pairs=6):
    changes = {"FF": [change, float("nan")], "FF block": [change, 1.0]}
    return PieceNumbers(row, window, 3, 1e-7 * (1 + window), changes, pairs, {"subwords": 2, "other": 1})


def test_windows_are_joined_and_failures_have_a_row(tmp_path):
    documents = [Document(0, "a b"), Document(1, Failure("TooLong", "9"), "x"), Document(2, "c")]
    parts = Parts([numbers(0, 0, 0.25), numbers(0, 1, 0.5), numbers(2, 0, 0.125)])
    tables = make_tables(LAYOUT, documents, {1: Failure("TooLong", "half \ud800")}, parts, "f.txt", 7)
    rows = tables["documents"].to_pylist()
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert (rows[0]["tokens"], rows[0]["windows"]) == (6, 2)
    assert rows[0]["change_ff_block"] == [0.375, 1.0]
    assert rows[0]["change_ff"][0] == 0.375
    assert rows[0]["change_ff"][1] != rows[0]["change_ff"][1]
    assert (rows[0]["all_pairs"], rows[0]["all_subwords"]) == (12, 4)
    assert (rows[1]["id"], rows[1]["error_type"]) == ("x", "TooLong")
    assert rows[1]["error"] == "half \\ud800"
    assert rows[1]["change_ff"] is rows[1]["tokens"] is None
    assert tables["pairs"].num_rows == tables["top"].num_rows == 0


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_that_is_no_number_is_not_lost_among_others(place):
    pieces = [numbers(0, 0, 0.25), numbers(0, 1, 0.5)]
    pieces[place] = replace(pieces[place], model_error=float("nan"))
    (row,) = make_tables(LAYOUT, [Document(0, "a")], {}, Parts(pieces))["documents"].to_pylist()
    assert math.isnan(row["model_error"])


def test_the_schema_carries_what_it_is_of(tmp_path):
    tables = make_tables(LAYOUT, [Document(0, "a")], {}, Parts([numbers(0, 0, 0.5)]))
    write_table(tables["documents"], tmp_path / "t.parquet")
    assert Layout.from_schema(pq.read_schema(tmp_path / "t.parquet")) == LAYOUT
    assert list(LAYOUT.schemas) == ["documents", "pairs", "top"]
    assert LAYOUT.schemas["pairs"].names[-2:] == ["subwords", "other"]
    assert name_change("FF block") == "change_ff_block"


def test_texts_have_dictionaries_and_floats_are_split(tmp_path):
    tables = make_tables(LAYOUT, [Document(0, "a")], {}, Parts([numbers(0, 0, 0.5)]), "f.txt")
    write_table(tables["documents"], tmp_path / "t.parquet")
    group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
    columns = {group.column(at).path_in_schema: group.column(at) for at in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["change_ff.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["model_error"].encodings
    assert "RLE_DICTIONARY" in columns["source"].encodings
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_a_thousand_parts_in_a_folder(tmp_path):
    assert part_path(tmp_path, "pairs", 12).relative_to(tmp_path).as_posix() == "pairs/000/part-000012.parquet"
    assert part_path(tmp_path, "maps", 12345).relative_to(tmp_path).as_posix() == "maps/012/part-012345.safetensors"
    for number in (1000, 2, 999):
        path = part_path(tmp_path, "pairs", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.stem for path in list_parts(tmp_path, "pairs")] == ["part-000002", "part-000999", "part-001000"]


@pytest.mark.parametrize("name", ["top:x", "map", "top:"])
def test_unknown_tables(name):
    with pytest.raises(ValueError, match=f"unknown table '{name}', expected some of"):
        Layout.from_keep((name,), scopes=(), layers=(0,), components=(), categories=())
