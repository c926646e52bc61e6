"""Builds the C++ extension where a compiler is at hand, and says in one line what is built and why.

FFATTR_CPU=auto|0|1 (default auto): 0 leaves the extension out, 1 makes a missing compiler an error.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=fast",  # ISO mode would otherwise keep products and sums apart
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the baseline's registers are never passed between files
    # The stable ABI of torch 2.11: one binary for this and every later release.
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def decide() -> tuple[bool, str]:
    """Whether to build the extension, and why (not)."""
    wanted = os.environ.get("FFATTR_CPU", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FFATTR_CPU={wanted!r}: expected auto, 0 or 1")
    if wanted == "0":
        return False, "FFATTR_CPU=0"
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for path in map(shutil.which, candidates) if path), None)
    if compiler is None:
        if wanted == "1":
            raise SystemExit(f"FFATTR_CPU=1, but there is no C++ compiler (looked for {', '.join(candidates)})")
        return False, f"no C++ compiler (looked for {', '.join(candidates)})"
    return True, f"C++ compiler {compiler}"


def extension() -> dict[str, object]:
    """The arguments of setup() that build ``ffattr._C`` and its build record."""
    build, reason = decide()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"building ffattr needs torch ({error}). Install torch first, then: pip install --no-build-isolation ."
        ) from error
    what = "C++ CPU kernels" if build else "pure Python (the torch backend runs everywhere)"
    print(f"ffattr: building {what}: {reason}; torch {torch.__version__}", flush=True)
    record = {"cpu": build, "torch": str(torch.__version__), "reason": f"{what}: {reason}"}

    class Build(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            package = ROOT / "ffattr" if self.inplace else Path(self.build_lib) / "ffattr"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build_info.py").write_text(
                f'"""Written by setup.py: what was built, and why."""\n\nBUILD = {record!r}\n'
            )
            if build:
                super().run()

        def get_outputs(self) -> list[str]:
            return super().get_outputs() if build else []

        def copy_extensions_to_source(self) -> None:
            if build:
                super().copy_extensions_to_source()

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    module = CppExtension(
        "ffattr._C", sources, depends=headers, extra_compile_args=COMPILE_FLAGS, include_dirs=[pybind_include()]
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def pybind_include() -> str:
    import pybind11

    return str(pybind11.get_include())


setup(**extension())
