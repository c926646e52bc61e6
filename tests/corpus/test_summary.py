"""What the tables say together is what one pass over all texts says."""

import pandas as pd
import pyarrow.parquet as pq
import pytest
from corpora import TEXTS, read_documents

from ffattr import study
from ffattr.corpus import add_first_texts, merge_parts, run_corpus, summarize
from ffattr.corpus import summary as summary_module
from ffattr.corpus.tables import list_parts
from ffattr.study.origins import shorten_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def expected(loaded):
    return study.of_model("tiny", loaded[0], [text for text in TEXTS if text], loaded[1], k=9, detailed=2)


@pytest.fixture(scope="module")
def found(undisturbed):
    return summarize(undisturbed, k=9)


def test_changes_and_their_errors(found, expected, undisturbed):
    columns = ["layer", "component", "before", "after", "value"]
    frame = found.frames["contextualization_change"]
    pd.testing.assert_frame_equal(frame[columns], expected.frames["contextualization_change"][columns], atol=1e-5)
    assert set(frame["documents"]) == {10}
    values = pd.Series([row["change_ff"][1] for row in read_documents(undisturbed) if row["change_ff"] is not None])
    row = frame.query("component == 'FF' and layer == 1").iloc[0]
    assert row["standard_error"] == pytest.approx(values.sem(), rel=1e-5)


def test_pairs_and_their_categories(found, expected):
    mine, whole = found.frames["amplified_pairs"], expected.frames["amplified_pairs"]
    columns = ["layer", "rank", "query", "key", "query_token", "key_token", "subwords", "adjacent", "other"]
    pd.testing.assert_frame_equal(mine[columns], whole[columns], check_dtype=False)
    assert mine["amplification"].to_numpy() == pytest.approx(whole["amplification"].to_numpy(), abs=1e-6)
    texts = [row for row, text in enumerate(TEXTS) if text]
    assert mine["row"].tolist() == [texts[batch] for batch in whole["batch"]]
    assert mine["line"].tolist() == [row + 1 for row in mine["row"]]
    assert mine["text"].tolist() == [shorten_text(TEXTS[row]) for row in mine["row"]]
    pd.testing.assert_frame_equal(
        found.frames["amplified_categories"], expected.frames["amplified_categories"], check_dtype=False
    )
    assert found.left_out == {}


def test_tokens_and_errors(found, expected):
    columns = ["norm", "own", "takes", "gives"]
    whole = expected.frames["token_summary"].groupby(["layer", "token"])[columns].mean()
    mine = found.frames["token_summary"].set_index(["layer", "token"])
    pd.testing.assert_frame_equal(mine[columns], whole, rtol=1e-4, check_dtype=False, check_index_type=False)
    assert mine["count"].sum() == len(expected.frames["token_summary"])
    kind, count, source, line, message = found.frames["errors"].iloc[0]
    assert (kind, count) == ("EmptyText", 1)
    assert source.endswith(".txt")
    assert not TEXTS[line - 1].strip()
    assert message


def test_what_takes_maps_and_vectors_is_of_the_first_texts(undisturbed, expected, loaded, tmp_path):
    found = summarize(undisturbed, k=9)
    add_first_texts(found, undisturbed, *loaded, detailed=2)
    places = ["source", "line", "id", "text"]
    for name in ("mixing_ratio", "cancellation", "norm_balance", "gain_balance"):
        mine, whole = (frames[name].drop(columns=places, errors="ignore") for frames in (found.frames, expected.frames))
        pd.testing.assert_frame_equal(mine, whole)
    first = found.frames["mixing_ratio"].iloc[0]
    assert first["text"] == shorten_text(TEXTS[first["line"] - 1])
    names = {path.name for path in study.write([found], tmp_path)}
    assert {"tables.md", "errors.csv", "contextualization_change.png", "scopes.png"} <= names


def test_where_more_pairs_may_count_it_is_said(compute, tmp_path):
    compute(tmp_path, pairs=1, keep=("pairs",))
    found = summarize(tmp_path, k=9)
    assert list(found.frames) == ["contextualization_change", "amplified_pairs", "amplified_categories", "errors"]
    said = found.left_out["some of amplified_pairs"]
    assert said.startswith("18 times all 1 pairs that were kept of a document and layer are among these 9")


def test_merged_parts_have_the_same_rows(undisturbed, tmp_path, monkeypatch):
    written = merge_parts(undisturbed, tmp_path / "merged")
    assert [path.name for path in written] == [
        f"{name}-00000.parquet" for name in ("documents", "pairs", "tokens", "top")
    ]
    for path in written:
        table = path.name.partition("-")[0]
        parts = [pq.ParquetFile(part).read() for part in list_parts(undisturbed, table)]
        assert pq.read_table(path).to_pylist() == [row for part in parts for row in part.to_pylist()] != []
    monkeypatch.setattr(summary_module, "_LARGE", 1)
    assert len(merge_parts(undisturbed, tmp_path / "small")) == 4 * 3


def test_what_cannot_be_summarized(compute, tmp_path, undisturbed, saved_model):
    from ffattr.corpus import Rank

    compute(tmp_path / "half", rank=Rank(0, 2))
    with pytest.raises(ValueError, match=r"is not finished, 1 of 3 shards are missing \(first shard 1\)"):
        summarize(tmp_path / "half")
    (tmp_path / "empty.txt").write_text("\n \n")
    run_corpus(saved_model, [str(tmp_path / "empty.txt")], tmp_path / "none", engine="here")
    with pytest.raises(ValueError, match="none of the documents could be measured: 2 EmptyText"):
        summarize(tmp_path / "none")
