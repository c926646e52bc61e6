"""Whatever is changed in a file shows."""

import pytest
import torch
from keeping import rewrite_metadata
from safetensors.torch import load_file
from synthetic import attribution

import ffattr
from ffattr.errors import FileFormatError
from ffattr.results.saved.checksum import compute_checksum, view_bytes

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True]), "c": torch.zeros(0, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "a": TENSORS["a"] + 1e-6},
        {**TENSORS, "a": TENSORS["a"].view(3, 2)},
        {**TENSORS, "a": TENSORS["a"].view(torch.int32)},
        {"A": TENSORS["a"], "b": TENSORS["b"], "c": TENSORS["c"]},
        {"a": TENSORS["a"], "b": TENSORS["b"]},
    ],
)
def test_names_dtypes_shapes_and_numbers_count(other):
    expected = compute_checksum(TENSORS, b"text")
    assert compute_checksum(dict(reversed(TENSORS.items())), b"text") == expected
    assert compute_checksum(TENSORS, b"Text") != expected
    assert compute_checksum(other, b"text") != expected


def test_bytes_are_those_of_the_numbers_in_their_order():
    whole = torch.arange(6, dtype=torch.int64).view(2, 3)
    assert bytes(view_bytes(whole.T)) == bytes(view_bytes(whole.T.contiguous()))
    assert bytes(view_bytes(torch.tensor(1, dtype=torch.int32))) == b"\x01\0\0\0"


def save(folder, mapped):
    path = folder / "maps.safetensors"
    attr = attribution(("atb",))
    if not mapped:
        attr.save(path)
        return path
    sink = ffattr.Dense(path=path).open({"atb": attr["atb"].shape}, torch.float32, attr.mask.device, (0,), (0,))
    sink.finish().maps["atb"].copy_(attr["atb"])
    sink.seal_file(*ffattr.results.serialise.to_parts(attr))
    return path


@pytest.mark.parametrize("mapped", [False, True])
def test_every_byte_behind_the_header_is_watched(tmp_path, mapped):
    path = save(tmp_path, mapped)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    assert len(whole) == start + size
    for place in range(start, len(whole), 41 if mapped else 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"(is damaged: its checksum is not crc32|lacks or garbles)"):
            ffattr.load(path)
    path.write_bytes(whole)
    assert torch.equal(ffattr.load(path)["atb"], attribution(("atb",))["atb"])


def test_who_does_not_verify_gets_what_there_is(tmp_path):
    path = save(tmp_path, mapped=False)
    rewrite_metadata(path, checksum="crc32:00000000")
    with pytest.raises(FileFormatError, match=r"read what there is with ffattr\.load\(path, verify=False\)"):
        ffattr.load(path)
    assert torch.equal(ffattr.load(path, verify=False)["atb"], attribution(("atb",))["atb"])


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_a_description_that_is_nested_without_end_is_refused(tmp_path, depth):
    path = save(tmp_path, mapped=False)
    rewrite_metadata(path, attribution='{"tokens": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(FileFormatError):
        ffattr.load(path, verify=False)
