"""Files that ffattr 0.1.0 saved before `Kept` was one value: they load as they did, and are written as they were.

``files/NAME.json`` is what that version's `ffattr.load` gave of ``files/NAME.safetensors``. "mapped" is what it wrote
for ``keep=Dense(torch.float16, path=...)``, whose header is 64 KiB of spaces: compressed.
"""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from ffattr import Dense, StackedAttribution, load
from ffattr.results.kept.dense import DenseMaps
from ffattr.results.serialise import to_parts

FILES = Path(__file__).parent / "files"
NAMES = sorted(path.stem for path in FILES.glob("*.json"))
FIELDS = (
    *("maps", "bias", "tokens", "layers", "queries", "scopes", "mask", "error", "plan", "arguments", "key_tokens"),
    *("key_mask", "groups", "experts", "shares", "largest", "reduced", "block", "sketch_error"),
)


def unpack(name, folder):
    """Returns a copy of an old file that a test may map."""
    packed = FILES / f"{name}.safetensors.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else packed.with_suffix("").read_bytes()
    path = folder / f"{name}.safetensors"
    path.write_bytes(content)
    return path


def list_fields(attr):
    """Returns all there is of an attribution as JSON takes it, every number exactly."""
    found = {name: _plain(getattr(attr, name)) for name in FIELDS}
    if isinstance(attr, StackedAttribution):
        found["stacks"] = {name: list_fields(stack) for name, stack in attr.stacks.items()}
    return found


def _plain(value):
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.flatten().tolist()}
    if dataclasses.is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def read_parts(path):
    """Returns the header without what is new or not the same everywhere, the version of torch and the checksum, and the
    rest. Its order is by chance."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]["torch_version"]
    header["__metadata__"].pop("checksum", None)
    return header, content[start:]


def test_every_kind_of_file_is_there():
    assert NAMES == ["dense", "encoder_decoder", "experts", "mapped", "pool", "top"]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_file_loads_as_it_did(tmp_path, name):
    expected = json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))
    assert list_fields(load(unpack(name, tmp_path))) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mapped"])
def test_an_old_file_is_saved_as_it_was(tmp_path, name):
    path = unpack(name, tmp_path)
    again = tmp_path / "again.safetensors"
    load(path).save(again)
    assert read_parts(again) == read_parts(path)


def test_an_old_mapped_file_is_written_as_it_was(tmp_path):
    path, again = unpack("mapped", tmp_path), tmp_path / "again.safetensors"
    old = load(path)
    assert isinstance(old.kept, DenseMaps)
    shapes = {scope: tuple(maps.shape) for scope, maps in old.maps.items()}
    sink = Dense(path=again).open(shapes, torch.float16, torch.device("cpu"), old.layers, old.queries)
    for scope, maps in sink.finish().maps.items():
        maps.copy_(old.maps[scope])
    sink.seal_file(*to_parts(old))
    assert read_parts(again) == read_parts(path)
