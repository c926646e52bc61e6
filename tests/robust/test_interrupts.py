"""An interrupt at any line of what touches a model, or writes a file, leaves both as they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hostile import FUZZ, describe_world, note
from interrupts import count_lines, interrupt_at
from synthetic import attribution

import ffattr
from ffattr.models.capture import passes
from ffattr.results.kept.dense import Dense

pytestmark = pytest.mark.usefixtures("one_thread")


def spread(count: int, few: int) -> Iterator[int]:
    """Lines from first to last: all of them where more is asked for, else a few that lie evenly."""
    step = 1 if few * 4 < FUZZ else max(1, count // few)
    return iter(range(1, count + 1, step))


def attack(area: str, call: Callable[[], Any], describe: Callable[[], object], few: int, *files: str) -> None:
    call()
    before = describe()
    for line in spread(count_lines(call, *files), few):
        assert interrupt_at(line, call, *files) or line > 1
        note(area, describe() == before, f"line {line}: {before} became {describe()}"[:400])


@pytest.mark.parametrize("name", ["bert", "mpnet", "mixtral", "torch-pre", "bart"])
def test_a_model_stays_as_it_was(name: str) -> None:
    model, given = tiny_models.build(name, dtype=torch.float32), tiny_models.inputs(name, 1, 4)
    given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    assert not passes._changes

    def describe() -> object:
        return describe_world(model), len(passes._changes), passes.find_pass(), passes._lock.acquire(blocking=False)

    def release_and_describe() -> object:
        found = describe()
        passes._lock.release()
        return found

    call = lambda: ffattr.attribute(model, given, scopes="attn")  # noqa: E731 (called three times)
    attack("interrupts of capture", call, release_and_describe, 60, "models/capture")
    found = ffattr.attribute(model, given, scopes="attn")
    assert float(found.error.max()) < 1e-4


def test_a_model_whose_structure_is_looked_for_stays_as_it_was() -> None:
    model = tiny_models.build("bert", dtype=torch.float32)
    for part in (model, model.base_model):
        part.config.model_type = "unknown"
    given = tiny_models.inputs("bert", 1, 4)
    call = lambda: ffattr.attribute(model, given, scopes="attn")  # noqa: E731
    attack("interrupts of capture", call, lambda: describe_world(model), 30, "models/capture", "models/detection")


@pytest.mark.parametrize("how", ["save", "page", "mapped"])
def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # waits for a disk, and touches nothing
    attr, path = attribution(("atb",)), tmp_path / "maps.safetensors"
    attr.save(path)
    old = path.read_bytes()

    def write_mapped() -> None:
        sink = Dense(path=path).open({"atb": tuple(attr["atb"].shape)}, torch.float32, attr.mask.device, (0,), (0,))
        try:
            sink.finish().maps["atb"].copy_(attr["atb"])
            sink.seal_file(*ffattr.results.serialise.to_parts(attr))
        except BaseException:
            sink.discard_file()
            raise

    calls = {"save": lambda: attr.save(path), "page": lambda: attr.to_html(path), "mapped": write_mapped}
    calls[how]()
    new = path.read_bytes()
    files = ("machine.py", "results/files.py", "results/saved", "results/kept/dense.py")
    for line in spread(count_lines(calls[how], *files), 80):
        path.write_bytes(old)
        interrupt_at(line, calls[how], *files)
        left = [file.name for file in tmp_path.iterdir()]
        whole = path.read_bytes() in (old, new) or how != "page"
        note("interrupts of files", left == [path.name] and whole, f"line {line} left {left}")
        for name in set(left) - {path.name}:  # each line is judged for itself
            (tmp_path / name).unlink()
        if how != "page":
            ffattr.load(path)
    attr.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
