"""Studies as files: tables, pictures, and what cannot be written."""

import math
import os

import pandas as pd
import pytest
from synthetic import PRE_LN, attribution

from ffattr import study
from ffattr.study.files import _fits_picture, _most_changed


def test_everything_is_written(tmp_path, corpus):
    files = study.write([corpus], tmp_path / "new" / "folder", ["png", "svg"])
    assert all(path.stat().st_size for path in files)
    names = {path.name for path in files}
    assert names == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert {f"{name}.csv" for name in corpus.frames} <= names
    pictures = ["contextualization_change", "amplified_categories", "cancellation", "scopes", "amplification"]
    assert {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} <= names
    for name, frame in corpus.frames.items():
        read = pd.read_csv(tmp_path / "new" / "folder" / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert list(read) == ["model", *frame]
        assert set(read["model"]) == {"tiny"}
        number = next(column for column in frame if frame[column].dtype == float)
        assert read[number].tolist() == pytest.approx(frame[number].tolist(), nan_ok=True)


def test_several_models_stand_side_by_side(tmp_path, corpus):
    other = study.of_maps("other", attribution(PRE_LN, layers=(0, 1), causal=True))
    files = {path.name for path in study.write([corpus, other], tmp_path)}
    assert {"scopes_tiny.png", "scopes_other.png", "cancellation_tiny.png", "contextualization_change.png"} <= files
    change = pd.read_csv(tmp_path / "contextualization_change.csv")
    assert change.groupby("model").size().to_dict() == {"tiny": 12, "other": 8}
    assert math.isnan(change.query("model == 'other'")["pairs"].iloc[0])


def test_what_is_not_written(tmp_path, corpus):
    with pytest.raises(ValueError, match="unknown format 'gif', expected some of png, svg, pdf"):
        study.write([corpus], tmp_path / "x", ["gif"])
    with pytest.raises(ValueError, match="each by a name of its own"):
        study.write([corpus, corpus], tmp_path / "x")
    with pytest.raises(ValueError, match="each by a name of its own"):  # in file names, that is
        study.write([study.Study("a/b", corpus.frames), study.Study("a-b", corpus.frames)], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        study.write([corpus], tmp_path / "file")


@pytest.mark.parametrize(
    ("scopes", "pictures"),
    [
        (("atb", "atb_ff_res_ln"), {"contextualization_change.png", "scopes.png"}),
        (("atb_ff", "atb_ff_res"), {"contextualization_change.png", "scopes.png"}),
        (("atb",), set()),  # which is the last scope too, and rolled out once
    ],
)
def test_maps_of_some_scopes_are_written(tmp_path, scopes, pictures):
    found = study.of_maps("some", attribution(scopes, layers=(0, 1)), rolled=True)
    study.write([found], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert not found.frames["rollout"].duplicated(["scope", "layer", "batch", "query", "key"]).any()


def test_a_folder_that_cannot_be_written_to_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file/x': .*file' is a file, expected a folder"):
        study.check(tmp_path / "file" / "x", ["png"])
    study.check(tmp_path / "new" / "folder", ["png", "pdf"])
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_with_the_file(tmp_path, corpus, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*contextualization_change\.csv'"):
        study.write([corpus], tmp_path)


@pytest.mark.parametrize(
    ("rows", "layer"),
    [
        ([(0, "FF", 0.1), (2, "FF", 0.3), (1, "RES", 0.9)], 2),  # the network before the other parts
        ([(0, "LN", 0.9), (1, "FF block", 0.2), (2, "FF block", 0.1)], 1),
        ([(0, "FF", math.nan), (1, "LN", 0.2), (2, "RES", 0.4)], 2),
        ([(0, "FF", math.nan), (3, "FF", math.nan)], 3),
    ],
)
def test_the_layer_that_is_drawn_is_the_one_that_changes_most(rows, layer):
    assert _most_changed(pd.DataFrame(rows, columns=["layer", "component", "value"])) == layer


@pytest.mark.parametrize(
    ("real", "queries", "fits"), [(2, None, True), (1, None, False), (201, None, False), (3, (4, 5), False)]
)
def test_maps_that_make_a_picture(real, queries, fits):
    example = attribution(("atb",), layers=(0,), tokens=max(6, real), real=(real,), queries=queries)
    assert _fits_picture(example) == fits


def test_names_of_studies_are_fit_for_files(tmp_path):
    other, some = (study.of_maps(name, attribution(("atb", "atb_ff"))) for name in ("org/model:7B é", "..."))
    names = {path.name for path in study.write([other, some], tmp_path, ["svg"]) if path.suffix == ".svg"}
    assert {"scopes_org-model-7B-é.svg", "scopes_....svg"} <= names
    assert {path.name for path in tmp_path.glob("*.svg")} == names


def test_a_spreadsheet_computes_no_token(tmp_path):
    attr = attribution(("atb", "atb_ff"), tokens=7, real=(7, 7), layers=(0,))
    attr.tokens = [["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2.5", "-", "=", "-a"]] * 2
    study.write([study.of_maps("odd", attr)], tmp_path, [])
    frame = pd.read_csv(tmp_path / "token_summary.csv")
    expected = ["'=1+1", "'+cmd|' /C calc'!A0", "'@SUM(A1)", "-2.5", "-", "=", "'-a"]
    assert frame["token"].astype(str).tolist()[:7] == expected
    assert frame["layer"].tolist() == [0] * len(frame)
