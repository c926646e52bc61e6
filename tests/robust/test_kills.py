"""Processes that die while they write, at any moment: the old file or the new one is there, and no orphan for long."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import FUZZ, note
from synthetic import attribution

import ffattr
from ffattr import Dense
from ffattr.results import files, serialise

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (30, 60)


def write_mapped(attr: ffattr.Attribution, path: Path) -> None:
    shapes = {"atb": tuple(attr["atb"].shape)}
    sink = Dense(path=path).open(shapes, torch.float32, attr.mask.device, attr.layers, attr.queries)
    sink.finish().maps["atb"].copy_(attr["atb"])
    sink.seal_file(*serialise.to_parts(attr))


WRITERS: dict[str, Callable[[ffattr.Attribution, Path], None]] = {
    "save": lambda attr, path: attr.save(path),
    "mapped": write_mapped,
    "page": lambda attr, path: attr.to_html(path),
}


def start_writer(how: str, path: Path) -> int:
    """Forks a process that writes one file after the other until it is killed, and returns its number."""
    made = [attribution(("atb",), tokens=tokens, real=(tokens, 4)) for tokens in SIZES]
    process = os.fork()
    if process:
        return process
    try:
        os.fsync = lambda handle: None  # waits for a disk, and touches nothing
        while True:
            for attr in made:
                WRITERS[how](attr, path)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", WRITERS)
def test_a_writer_that_is_killed(tmp_path: Path, how: str) -> None:
    path, chance = tmp_path / "maps", random.Random(how)
    for _ in range(FUZZ or 15):
        process = start_writer(how, path)
        time.sleep(chance.uniform(0.001, 0.06))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        if path.exists() and how == "page":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        elif path.exists():
            assert ffattr.load(path).mask.shape[1] in SIZES
        attribution(("atb",)).save(tmp_path / "next")
        left = sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("."))
        note("kills", left == [], f"left {left}")
        for name in left:  # each kill is judged for itself
            (tmp_path / name).unlink()


@pytest.mark.parametrize("place", ["save_file", "replace", "chmod", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    path = tmp_path / "maps.safetensors"
    attribution(("atb",), seed=1).save(path)
    old = path.read_bytes()

    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr({"save_file": files, "chmod": Path}.get(place, os), place, fail)
    with pytest.raises(type(error)) as found:
        attribution(("atb",), seed=2).save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if isinstance(error, OSError):
        assert "partial" not in str(found.value)
