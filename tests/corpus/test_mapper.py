"""Documents to pieces, pieces to batches, batches that raise in halves; and columns to columns."""

import errno

import pandas as pd
import pyarrow as pa
import pytest

from ffattr.corpus import Mapper
from ffattr.corpus.documents import Document, Failure
from ffattr.corpus.measure import Measure

pytestmark = pytest.mark.usefixtures("one_thread")


def mapper(loaded, **options):
    return Mapper(*loaded, **options)


def test_columns_to_columns(loaded):
    """What frameworks want: as many values in each column as there are documents, whatever becomes of these."""
    given = {"text": ["The cat sat.", None, "  ", "two dogs"], "key": [7, 8, 9, 10]}
    found = mapper(loaded, pairs=2, id="key", keep=("pairs", "tokens", "top:1"))(given)
    assert {len(column) for column in found.values()} == {4}
    assert found["id"] == ["7", "8", "9", "10"]
    assert found["error_type"] == [None, "NotText", "EmptyText", None]
    assert [len(rows) for rows in found["pairs"]] == [4, 0, 0, 4]
    assert found["token_count"] == [6, None, None, 5]
    assert [row["token"] for row in found["tokens"][3] if row["layer"] == 1] == ["[CLS]", "two", "dog", "##s", "[SEP]"]
    assert found["change_ff"][0] == pytest.approx(mapper(loaded)({"text": ["The cat sat."]})["change_ff"][0], abs=1e-6)
    assert pa.table(found).num_rows == len(pd.DataFrame(found)) == 4


def test_tables_to_tables_of_the_same_types(loaded):
    """Frameworks join batches: one without errors, or without anything else, has the columns of the others."""
    made = mapper(loaded, pairs=2, id="key", keep=("pairs", "tokens", "top:1"))
    batches = [{"text": ["The cat sat.", "two dogs"], "key": [7, 8]}, {"text": [None, ""], "key": ["a", None]}]
    first, second = (made(pa.table(batch)) for batch in batches)
    assert first.schema == second.schema
    assert pa.concat_tables([first, second]).num_rows == 4
    for table, batch in zip((first, second), batches, strict=True):
        assert table.to_pylist() == pa.table(made(batch), table.schema).to_pylist()


def test_too_long(loaded):
    text = "the cat sat on a mat and a dog saw it"  # 11 tokens and two special ones
    for options, windows in (({"long": "cut"}, [8]), ({"long": "window"}, [8, 7]), ({"long": "error"}, None)):
        found = mapper(loaded, max_tokens=8, **options).encode(Document(5, text))
        if windows is None:
            assert found == Failure("TooLong", "13 tokens, expected at most 8")
        else:
            assert [len(piece.ids) for piece in found] == windows
            assert [(piece.row, piece.window) for piece in found] == [(5, number) for number in range(len(windows))]
    assert mapper(loaded).limit.tokens == 32  # the model's own positions
    assert mapper(loaded, max_tokens=99).limit.tokens == 32
    rows = mapper(loaded, max_tokens=8, long="window")({"text": [text]})
    assert (rows["tokens"][0][-1]["window"], rows["windows"]) == (1, [2])
    with pytest.raises(ValueError, match="long='shorten', expected 'error', 'cut' or 'window'"):
        mapper(loaded, long="shorten")


def test_batches_are_a_function_of_the_pieces(loaded):
    made = mapper(loaded, batch_tokens=12)
    texts = ["the cat", "a", "the cat sat on", "dog", "the dog"]
    pieces = [piece for row, text in enumerate(texts) for piece in made.encode(Document(row, text))]
    batches = made.cut_batches(pieces)
    assert [[piece.row for piece in batch] for batch in batches] == [[2, 0], [4, 1, 3]]
    assert made.cut_batches(pieces[::-1]) == batches
    assert [len(batch) for batch in mapper(loaded, batch_tokens=1).cut_batches(pieces)] == [1] * 5


def test_a_batch_that_raises_is_halved_down_to_the_document(loaded, monkeypatch):
    compute, calls = Measure.compute, []

    def compute_or_raise(self, batch):
        calls.append([piece.row for piece in batch])
        if 5 in calls[-1]:
            raise RuntimeError("row\n5")
        return compute(self, batch)

    made = mapper(loaded)
    pieces = [piece for row in range(8) for piece in made.encode(Document(row, "the cat"))]
    monkeypatch.setattr(Measure, "compute", compute_or_raise)
    parts, failures = made.compute(pieces)
    assert failures == {5: Failure("RuntimeError", "row 5")}
    assert sorted(piece.row for part in parts for piece in part.pieces) == [0, 1, 2, 3, 4, 6, 7]
    assert calls == [[*range(8)], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [4], [5], [6, 7]]


def test_a_full_disk_is_no_fault_of_a_document(loaded, monkeypatch):
    def fail(self, batch):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = mapper(loaded)
    monkeypatch.setattr(Measure, "compute", fail)
    with pytest.raises(OSError, match="No space left"):
        made.compute(made.encode(Document(0, "the cat")))


def test_half_a_character_fails_alone(loaded):
    found = mapper(loaded)({"text": ["the cat", "\ud800"]})
    assert found["error_type"][0] is None
    assert found["error_type"][1] is not None


def test_a_tokenizer_is_needed(loaded):
    with pytest.raises(TypeError, match="tokenizer is None, expected the model's"):
        Mapper(loaded[0])
