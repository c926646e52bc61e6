"""Whether the emulator of CUDA kernels finds the mistakes that it is there to find."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from emulated import library
from paths import HELPERS
from torch import Tensor

FAULTS = ["none", "wait", "barrier", "arrival", "kind", "converge", "outside", "alignment", "bytes"]  # as in faults.cpp
KERNELS = ["copy", "shuffle", "box", "product"]

FROM = torch.arange(512, dtype=torch.float32)
RIGHT = {
    "copy": FROM.view(128, 4)[:, 0].roll(-1),
    "shuffle": FROM[:128],
    "box": FROM[:128],
    "product": torch.full((128,), 16.0),
}


@pytest.fixture(scope="module")
def faults() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library([HELPERS / "emulator" / "faults.cpp"])))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def run(faults: ctypes.CDLL, kernel: str, fault: str) -> tuple[str, Tensor]:
    """What the emulator says, and what the kernel wrote."""
    given = torch.full((512 + 4,), torch.nan)
    given = given[(-given.data_ptr() % 16) // 4 :][:512].copy_(FROM)
    to = torch.full((128,), -1.0)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, to))
    return faults.run(kernel.encode(), FAULTS.index(fault), *pointers).decode(), to


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_right_runs(kernel: str, faults: ctypes.CDLL) -> None:
    for _ in range(3):  # in another order each time
        why, found = run(faults, kernel, "none")
        assert why == ""
        assert torch.equal(found, RIGHT[kernel])


@pytest.mark.parametrize(
    ("kernel", "fault"), [("copy", "wait"), ("copy", "barrier"), ("box", "wait"), ("product", "wait")]
)
def test_what_is_not_waited_for_is_not_there(kernel: str, fault: str, faults: ctypes.CDLL) -> None:
    _, found = run(faults, kernel, fault)
    assert not torch.equal(found, RIGHT[kernel])


@pytest.mark.parametrize(
    ("kernel", "fault", "named"),
    [
        ("copy", "arrival", "the threads of block 0 wait for each other"),
        ("copy", "kind", "threads that belong together are at __syncthreads(_or)? and at __syncthreads(_or)?"),
        ("copy", "outside", r"shared address \d+ is outside"),
        ("copy", "alignment", r"shared address \d+ is not aligned"),
        ("shuffle", "converge", "threads that belong together are at .*ldmatrix.*"),
        ("box", "arrival", "a barrier that nobody has initialised"),
        ("box", "bytes", "the threads of block 0 wait for each other"),
        ("product", "arrival", "products that are waited for, but not committed"),
        ("product", "alignment", "an operand that is not aligned"),
    ],
)
def test_mistakes_are_named(kernel: str, fault: str, named: str, faults: ctypes.CDLL) -> None:
    why, _ = run(faults, kernel, fault)
    assert re.fullmatch(f"emulator: {named}", why), why
