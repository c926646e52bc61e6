"""Files that any reader of safetensors reads, written in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from ffattr.results.saved.write import DTYPES, save_file


def test_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(5).reshape(5, 1).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "turned": torch.arange(6).reshape(2, 3).T}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"about": "Ä \x00"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"about": "Ä \x00"}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert size % 8 == 0
    for name, entry in json.loads(path.read_bytes()[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % found[name].element_size() == 0


def test_it_stays_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old, and longer than what comes " * 99)
    before = path.stat().st_ino
    save_file({}, path)
    assert path.stat().st_ino == before
    assert load_file(path) == {}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_other_dtypes(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex64"):
        save_file({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "a")
