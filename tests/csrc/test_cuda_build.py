"""The CUDA kernels as they were compiled: what ptxas said of each, and that the binary needs no CUDA to import."""

import subprocess
import sys

import pytest
from paths import CSRC

try:
    from ffattr._build_info import BUILD
except ImportError:
    BUILD = {}

pytestmark = pytest.mark.skipif(
    not BUILD.get("cuda"), reason=BUILD.get("cuda_reason", "the package was not built with CUDA kernels")
)

KERNELS = BUILD.get("kernels", [])

# (kernel, architecture): why it may spill or have a stack frame.
SPILLING = {}


def _name(record):
    return f"{record['source']}, sm_{record['architecture']}, {record['kernel']}"


def test_the_binary_imports_in_a_fresh_interpreter():
    code = "from ffattr.ops import library; print(library.binary.info['instruction set'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_was_compiled_for_every_architecture():
    expected = {
        (path.name, architecture)
        for path in CSRC.rglob("*.cu")
        for architecture in BUILD["architectures"]
        if architecture == "90a" or not path.stem.endswith("_sm90")
    }
    assert {(record["source"], record["architecture"]) for record in KERNELS} == expected


def test_nothing_spills():
    spilling = [
        record
        for record in KERNELS
        if record["stack"] or record["spill_stores"] or record["spill_loads"]
        if (record["kernel"], record["architecture"]) not in SPILLING
    ]
    assert not spilling, "\n".join(f"{_name(record)}: {record}" for record in spilling)


def test_no_reason_is_out_of_date():
    found = {(record["kernel"], record["architecture"]) for record in KERNELS if record["stack"]}
    needless = [key for key in SPILLING if key[1] in BUILD["architectures"] and key not in found]
    assert not needless


def test_registers():
    assert all(0 < record["registers"] <= 255 for record in KERNELS)


def test_nothing_is_serialised():
    """ptxas says so where a wgmma pipeline does not overlap, or where registers are not handed over."""
    lines = [f"{_name(record)}: {line}" for record in KERNELS for line in record["warnings"]]
    assert not [line for line in lines if "Performance Loss" in line or "serialized" in line]
