"""Whole maps in files that are written while they are computed."""

import errno
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from keeping import SCOPES, feed, kept, opened, result_of, some
from paths import environment
from safetensors.torch import load_file

from ffattr import Dense, load
from ffattr.errors import FileFormatError

pytestmark = pytest.mark.usefixtures("one_thread")


def _mapped(tensor, path):
    """Whether a tensor's numbers lie in a file that is mapped into memory."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return str(path) in line
    return False


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [7, 8])
def test_a_file_is_what_save_would_have_made(tmp_path, tokens, dtype):
    attr = some(tokens=tokens, queries=(5, 0, 2), real=((0, 1, 3, 4, 5, 6), (2, 3, 4), (6,)))
    attr.tokens[0][0] = "Ġthe 日本\n"
    attr.plan = "a plan " * 20_000  # longer than the header
    path = tmp_path / "maps.safetensors"
    found = kept(Dense(dtype, path), attr, cut=2)
    expected = kept(Dense(dtype), attr)
    assert [file.name for file in tmp_path.iterdir()] == ["maps.safetensors"]
    loaded = load(path)
    for other in (found, loaded):
        assert other.maps.keys() == expected.maps.keys()
        for scope, maps in expected.maps.items():
            assert torch.equal(other.maps[scope], maps)
            assert other.maps[scope].dtype == maps.dtype
            if sys.platform == "linux":
                assert _mapped(other.maps[scope], path)
    expected.save(tmp_path / "saved.safetensors")
    saved = load(tmp_path / "saved.safetensors")
    assert all(torch.equal(loaded.bias[scope], saved.bias[scope]) for scope in SCOPES)
    for name in ("tokens", "layers", "queries", "scopes", "plan", "arguments", "key_tokens", "block"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert torch.equal(loaded.mask, saved.mask)
    assert torch.equal(loaded.error, saved.error)
    tensors = load_file(path)  # any reader of safetensors
    assert torch.equal(tensors["maps.atb"], expected.maps["atb"])


def test_every_tensor_in_the_file_is_aligned(tmp_path):
    attr = some(("atb",), layers=(1,), tokens=3, real=((0, 1, 2),), queries=(0,))
    path = tmp_path / "a.safetensors"
    kept(Dense(torch.float16, path), attr)  # three numbers of two bytes
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_results_may_be_changed_without_changing_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    attr = some(("atb",))
    found = kept(Dense(path=path), attr)
    found.maps["atb"] += 1
    loaded = load(path)
    assert torch.equal(loaded.maps["atb"], attr.maps["atb"])
    loaded.maps["atb"] += 1
    assert torch.equal(load(path).maps["atb"], attr.maps["atb"])


def test_saving_onto_the_file_that_the_maps_are_read_from(tmp_path):
    path = tmp_path / "a.safetensors"
    attr = some(("atb",))
    found = kept(Dense(path=path), attr)
    found.maps["atb"][0, 0, 0] = 9.0
    found.save(path)
    assert torch.equal(load(path).maps["atb"], found.maps["atb"])
    loaded = load(path)
    loaded.save(path)
    assert torch.equal(load(path).maps["atb"], found.maps["atb"])
    assert list(tmp_path.iterdir()) == [path]


def _open(path, attr):
    return opened(Dense(path=path), attr)


def test_an_unfinished_file_is_none(tmp_path):
    attr = some()
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    sink = feed(_open(path, attr), attr)
    (temporary,) = (file for file in tmp_path.iterdir() if file != path)
    assert temporary.suffix == ".safetensors"
    assert path.read_bytes() == b"old"
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(temporary)
    sink.finish()
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(temporary)
    sink.discard_file()
    assert list(tmp_path.iterdir()) == [path]
    sink.discard_file()


def test_discarding_a_finished_file_leaves_it(tmp_path):
    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    result_of(sink, attr, sink.finish())
    sink.discard_file()
    assert load(tmp_path / "a.safetensors").scopes == ("atb",)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_that_cannot_be_finished_vanishes(tmp_path, monkeypatch, function):
    def fail(*_):
        raise OSError(errno.EIO, "broken")

    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="broken"):
        result_of(sink, attr, sink.finish())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, offset, length):
        asked.append((offset, length))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    attr = some(("atb",))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(
        OSError, match=r"no room for 0\.\d\d GiB of maps \(No space left on device\).*a\.safetensors"
    ) as e:
        _open(path, attr)
    assert e.value.errno == errno.ENOSPC
    ((offset, length),) = asked
    assert offset == 0
    assert length > attr.maps["atb"].nbytes
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_room_is_taken_at_the_start_also_where_there_is_no_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    attr = some(("atb",), tokens=200, real=(tuple(range(200)),))
    sink = _open(tmp_path / "a.safetensors", attr)
    (temporary,) = tmp_path.iterdir()
    assert temporary.stat().st_blocks * 512 >= attr.maps["atb"].nbytes
    feed(sink, attr, cut=200)
    result_of(sink, attr, sink.finish())
    assert torch.equal(load(tmp_path / "a.safetensors").maps["atb"], attr.maps["atb"])


def test_where_a_file_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        _open(tmp_path / "none" / "a.safetensors", some())
    with pytest.raises(IsADirectoryError):
        _open(tmp_path, some())


def test_the_folder_of_the_start_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attr = some(("atb",))
    sink = feed(_open("a.safetensors", attr), attr)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = result_of(sink, attr, sink.finish())
    assert torch.equal(found.maps["atb"], attr.maps["atb"])
    assert (tmp_path / "a.safetensors").is_file()


def test_more_scopes_than_the_header_has_room_for(tmp_path):
    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    sink.finish()
    with pytest.raises(ValueError, match=r"1002 tensors do not fit the header of .*: ask for fewer scopes"):
        sink.seal_file({f"bias.{n}": torch.zeros(1) for n in range(1000)}, {})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from keeping import feed, opened, some
from ffattr import Dense
attr = some(("atb",))
sink = feed(opened(Dense(path=sys.argv[1]), attr), attr)
os._exit(7)
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path):
    path = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", KILLED, str(path)]
    result = subprocess.run(command, env=environment(), check=False)
    assert result.returncode == 7
    assert not path.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(FileFormatError):
            load(left)
