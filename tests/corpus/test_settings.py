"""A run is written down once, and whatever is not that run is refused by name."""

import json
import os

import pytest

from ffattr.corpus import settings
from ffattr.corpus.settings import Options, RunMismatch, begin_run, describe_machine, read_run
from ffattr.engine import machine_rates


@pytest.fixture
def begin(tmp_path, saved_model, corpus_file):
    def run(model=saved_model, inputs=(corpus_file,), **options):
        return begin_run(tmp_path / "out", model, list(inputs), Options(**{"shard_docs": 4, **options}))

    return run


def test_what_is_written_is_read(begin, tmp_path, saved_model):
    run = begin(keep=("documents", "top:3"), layers="0:1")
    assert run == read_run(tmp_path / "out") == begin(keep=("documents", "top:3"), layers="0:1")
    assert (run.model, run.documents, [shard.count for shard in run.shards]) == (saved_model, 11, [4, 4, 3])
    written = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert written["model"]["weights"] == {"model.safetensors": os.path.getsize(f"{saved_model}/model.safetensors")}
    assert {"instruction set", "torch", "transformers", "pyarrow"} <= set(written["machine"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 3}, "options.pairs was 10, and is 3 now"),
        ({"shard_docs": 5}, "options.shard_docs was 4, and is 5 now"),
        ({"threads": 2}, "options.threads was 1, and is 2 now"),
        ({"keep": ("documents",)}, "options.keep was"),
    ],
)
def test_other_options_are_refused(begin, change, message):
    begin()
    with pytest.raises(RunMismatch, match=message):
        begin(**change)


def test_other_inputs_are_refused(begin, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("a\nb\n")
    begin(inputs=[str(text)])
    (tmp_path / "u.txt").write_text("a\n")
    with pytest.raises(RunMismatch, match=r"number of inputs was 1, and is 2 now"):
        begin(inputs=[str(text), str(tmp_path / "u.txt")])
    text.write_text("a\nc\n")
    with pytest.raises(RunMismatch, match=r"inputs\[0\].changed was"):
        begin(inputs=[str(text)])
    text.write_text("a\nb\nc\n")
    with pytest.raises(RunMismatch, match=r"inputs\[0\].size was 4, and is 6 now"):
        begin(inputs=[str(text)])


def test_another_model_machine_and_rates_are_refused(begin, monkeypatch):
    begin()
    with monkeypatch.context() as patch:
        patch.setattr(settings, "_describe_model", lambda name: {"name": name, "config": "x"})
        with pytest.raises(RunMismatch, match=r"model.config was '\w+', and is 'x' now"):
            begin()
    with monkeypatch.context() as patch:
        patch.setattr(settings, "describe_machine", lambda: describe_machine() | {"torch": "1.0"})
        with pytest.raises(RunMismatch, match=r"machine.torch was '.*', and is '1.0' now"):
            begin()
    rates = machine_rates.Rates(**dict.fromkeys(machine_rates.Rates.__dataclass_fields__, 2.0))
    with monkeypatch.context() as patch:
        patch.setattr(settings, "calibrated", lambda *_: rates)
        with pytest.raises(RunMismatch, match=r"rates.product was 50000000000.0, and is 2.0 now"):
            begin()


def test_a_folder_that_holds_something_else(begin, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run of `ffattr corpus`: there is no _run.json"):
        read_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds other files and no _run\.json"):
        begin()
    (tmp_path / "out" / "_run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this ffattr reads 1"):
        read_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs is 0, expected at least 1"),
        ({"long": "short"}, "long is 'short', expected"),
        ({"layers": "a"}, "'a': expected numbers"),
        ({"target": "1"}, "the table 'scores' and a target go together"),
        ({"keep": ("scores",)}, "the table 'scores' and a target go together"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_a_model_that_is_not_there(begin):
    with pytest.raises(FileNotFoundError, match=r"no model at './nowhere'"):
        begin(model="./nowhere")
