"""Builds the C++ library where a compiler is at hand, and says in one line what is built and why.

FFATTR_CPU=auto|0|1 (default auto): 0 leaves the library out, 1 makes a missing compiler an error.
FFATTR_CUDA=auto|0|1 (default auto): whether the library gets CUDA kernels. auto: where there is nvcc and torch is a
CUDA build; 1: where there is nvcc, whatever torch is, and an error elsewhere; 0: never.
TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0") names other GPUs than those of csrc/build_cuda.py; CUDA_HOME names the toolkit.
FFATTR_SANITIZE=address,undefined has the CPU kernels watched by the compiler's sanitizers (`make test-sanitized`).
"""

from __future__ import annotations

import os
import pprint
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
if str(CSRC) not in sys.path:  # pip runs this file from a place of its own
    sys.path.insert(0, str(CSRC))

import build_cuda  # noqa: E402

COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=fast",  # ISO mode would otherwise keep products and sums apart
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own flags ask for debug information, nine tenths of the binary
    "-Wall",
    "-Wno-psabi",  # vectors wider than the baseline's registers are never passed between files
    # The stable ABI of torch 2.11: one binary for this and every later release.
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


SANITIZERS = ("address", "undefined")


def setting(name: str) -> str:
    """auto, 0 or 1: the value of an environment variable."""
    wanted = os.environ.get(name) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={wanted!r}: expected auto, 0 or 1")
    return wanted


def sanitize_flags() -> list[str]:
    """Returns what the compiler and the linker are told of ``FFATTR_SANITIZE``, names with commas; nothing without it.

    The first mistake ends the process. Raises SystemExit for a name that is not among ``SANITIZERS``.
    """
    asked = os.environ.get("FFATTR_SANITIZE", "")
    if not asked:
        return []
    if unknown := sorted(set(asked.split(",")) - set(SANITIZERS)):
        raise SystemExit(f"FFATTR_SANITIZE={asked!r}: {unknown[0]!r} is not one of {', '.join(SANITIZERS)}")
    return [f"-fsanitize={asked}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


def try_compiler(command: list[str]) -> str | None:
    """What is wrong with a C++ compiler: it is run on lines that need C++20. None: nothing."""
    lines = "#include <concepts>\nstd::integral auto one() { return 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text(lines)
        tried = [*command, "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            done = subprocess.run(tried, capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    return f"exit code {done.returncode}: {said[0].strip()}"


def decide() -> tuple[bool, str]:
    """Whether to build the library, and why (not)."""
    wanted = setting("FFATTR_CPU")
    if wanted == "0":
        return False, "FFATTR_CPU=0"
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for path in map(shutil.which, candidates) if path), None)
    if compiler is None:
        if wanted == "1":
            raise SystemExit(f"FFATTR_CPU=1, but there is no C++ compiler (looked for {', '.join(candidates)})")
        return False, f"no C++ compiler (looked for {', '.join(candidates)})"
    command = [compiler, *(os.environ["CXX"].split()[1:] if os.environ.get("CXX") else [])]
    if wrong := try_compiler(command):
        if wanted == "1":
            raise SystemExit(f"FFATTR_CPU=1, but {compiler} compiles no C++20 ({wrong})")
        return False, f"{compiler} compiles no C++20 ({wrong})"
    return True, f"C++ compiler {compiler}"


def decide_cuda(library_built: bool, torch_version: str, torch_cuda: str | None) -> tuple[Any, str]:
    """The toolkit to build CUDA kernels with, or None, and why (not); ``torch_cuda``: the CUDA of torch, if any."""
    wanted = setting("FFATTR_CUDA")
    if wanted == "0":
        return None, "FFATTR_CUDA=0"
    if not library_built:
        if wanted == "1":
            raise SystemExit(
                "FFATTR_CUDA=1, but the C++ library that holds the CUDA kernels is not built: "
                "leave FFATTR_CPU unset and have a C++ compiler, or set FFATTR_CUDA=0"
            )
        return None, "the C++ library, which holds them, is not built"
    if wanted == "auto" and torch_cuda is None:
        return None, f"torch {torch_version} is built without CUDA (FFATTR_CUDA=1 compiles them all the same)"
    try:
        toolkit = build_cuda.find_toolkit()
    except build_cuda.NoToolkit as error:
        if wanted == "1":
            raise SystemExit(
                f"FFATTR_CUDA=1, but {error}: install the CUDA toolkit or set CUDA_HOME to its folder; "
                "FFATTR_CUDA=0 does without"
            ) from error
        return None, str(error)
    if wanted == "auto" and torch_cuda and toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        # The runtime that is linked in needs a driver as new as the toolkit, which torch may do without.
        return None, f"nvcc is {toolkit.version}, torch is for CUDA {torch_cuda} (FFATTR_CUDA=1 compiles all the same)"
    return toolkit, f"nvcc {toolkit.version} at {toolkit.nvcc}"


def extension() -> dict[str, Any]:
    """The arguments of setup() that build ``ffattr/libffattr.so`` and its build record."""
    build, reason = decide()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"building ffattr needs torch ({error}). Install torch first, then: pip install --no-build-isolation ."
        ) from error
    torch_version = str(torch.__version__)
    toolkit, cuda_reason = decide_cuda(build, torch_version, torch.version.cuda)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    architectures, remarks = build_cuda.pick_architectures(asked, toolkit.architectures) if toolkit else ([], [])
    what = "C++ CPU kernels" if build else "pure Python (the torch backend runs everywhere)"
    cuda = f"CUDA kernels for {', '.join(architectures)}" if toolkit else "no CUDA kernels"
    print(f"ffattr: building {what}: {reason}; {cuda}: {cuda_reason}; torch {torch_version}", flush=True)
    for remark in remarks:
        print(f"ffattr: {remark}", flush=True)
    sanitizing = sanitize_flags()
    if sanitizing:
        print(f"ffattr: {sanitizing[0]}: slow, for tests alone", flush=True)
    record: dict[str, Any] = {"cpu": build, "torch": torch_version, "reason": f"{what}: {reason}"}
    record |= {"cuda": toolkit is not None, "cuda_reason": f"{cuda}: {cuda_reason}"}

    # Sources that are not compiled here are named all the same: what the library depends on goes into an sdist.
    files = sorted(path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh", "*.py") for path in CSRC.rglob(pattern))
    sources = [path for path in files if path.suffix == ".cpp"]
    depends = [path for path in files if path.suffix != ".cpp"] + [ROOT / "ffattr" / "ops" / "schemas.inc"]
    library = CppExtension(
        "ffattr.libffattr",
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in depends],
        extra_compile_args=[*COMPILE_FLAGS, *sanitizing],
        extra_link_args=list(sanitizing),
        py_limited_api=True,  # nothing of Python is linked
    )
    if toolkit:
        library.extra_link_args += [f"-L{toolkit.libraries}", *build_cuda.LINK_FLAGS]

    def make_cuda_objects() -> None:
        """Compiles the .cu files for the library, and records what ptxas says of their kernels."""
        include = str(Path(torch.__file__).parent / "include")
        # Not in the build's own folder, which is another each time for an editable installation.
        folder = ROOT / "build" / "cuda"
        objects = build_cuda.objects(toolkit, CSRC, folder, architectures, include, torch_version)
        headers = [path for path in depends if path.suffix in (".h", ".cuh") and CSRC / "cpu" not in path.parents]
        build_cuda.make_all(objects, headers)
        library.extra_objects = [str(item.path) for item in objects]
        record["nvcc"] = toolkit.version
        record["architectures"] = architectures
        record["kernels"] = build_cuda.kernels(objects, toolkit.folder)

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # setuptools would throw away what was compiled
                self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

        def run(self) -> None:
            # Even where no source is newer than the binary, another choice of kernels needs another link.
            self.force = True
            if toolkit:
                make_cuda_objects()
            if build:
                super().run()
            package = ROOT / "ffattr" if self.inplace else Path(self.build_lib) / "ffattr"
            package.mkdir(parents=True, exist_ok=True)
            # A module of earlier versions, and a library that would be loaded although it was not asked for.
            for old in (*package.glob("_C.*"), *([] if build else package.glob("libffattr.*"))):
                old.unlink()
            text = pprint.pformat(record, width=118, sort_dicts=False)
            (package / "_build_info.py").write_text(
                f'"""Written by setup.py: what was built, and why."""\n\nBUILD = {text}\n'
            )

        def get_outputs(self) -> list[str]:
            return super().get_outputs() if build else []

        def copy_extensions_to_source(self) -> None:
            if build:
                super().copy_extensions_to_source()

    class Wheel(bdist_wheel):  # type: ignore[misc]
        def get_tag(self) -> tuple[str, str, str]:
            """One wheel for every Python: the library knows none."""
            return ("py3", "none", super().get_tag()[2])

    return {"ext_modules": [library], "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


if __name__ == "__main__":  # pip says so too
    setup(**extension())
