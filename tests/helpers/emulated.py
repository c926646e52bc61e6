"""To be imported before ``torch.ops.ffattr_cuda`` is tested: on the GPU, where there is one that the package was built
for. Elsewhere importing this registers the same kernels for the CPU, compiled by g++ for the emulator of
``tests/helpers/emulator``; the first time it takes half a minute."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from paths import CSRC, HELPERS, ROOT

from ffattr.ops import availability

__all__ = ["DEVICE", "EMULATED", "library"]

EMULATED = not (torch.cuda.is_available() and availability.has_cuda_kernels("cuda"))
DEVICE = torch.device("cpu" if EMULATED else "cuda")

_TORCH = Path(torch.__file__).parent
_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as in CUDA
    "-U_FORTIFY_SOURCE",  # which takes a jump to another stack for a mistake
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{ROOT / 'csrc' / 'cuda'}",
    f"-I{HELPERS / 'emulator'}",
    f"-isystem{_TORCH / 'include'}",
]


def library(sources: Iterable[Path]) -> Path:
    """Compiles ``sources`` for the emulator to a shared library, which ``.cache/emulated`` keeps. Skips the test, or
    the module that is being imported, where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("neither a GPU with kernels for it nor g++ to emulate them", allow_module_level=True)
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    headers = [*sorted((CSRC).rglob("*.h")), *sorted((HELPERS / "emulator").glob("*.h"))]
    common = _digest(version, torch.__version__.encode(), *map(str.encode, _FLAGS), *(p.read_bytes() for p in headers))

    def compiled(source: Path) -> Path:
        key = _digest(common, source.name.encode(), source.read_bytes())
        return _made(key, f"{source.stem}.o", [compiler, *_FLAGS, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    linked = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    key = _digest(common, *(str(path).encode() for path in objects))
    return _made(key, "library.so", [compiler, "-shared", *map(str, objects), *linked])


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _made(key: bytes, name: str, command: list[str]) -> Path:
    """Returns ``.cache/emulated/KEY/NAME``, made by ``command`` if it is not there. It is never half written, and made
    once: another process that wants it meanwhile waits, and makes what nobody has begun."""
    target = ROOT / ".cache" / "emulated" / key.hex()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        made = Path(folder) / name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        made.replace(target)
    return target


if EMULATED:
    torch.ops.load_library(library(sorted((CSRC / "cuda").glob("*.cu"))))
