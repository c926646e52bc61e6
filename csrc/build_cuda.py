"""Compiles the .cu files for setup.py: finds nvcc, picks architectures, makes one object a file, reads ptxas's report.

Nothing here needs torch or setuptools, and nothing is kept but files in the folder of the objects.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ARCHITECTURES = ["80", "90a", "100"]
OLDEST_ARCHITECTURE = 80  # asynchronous copies, bfloat16 on tensor cores
OLDEST_NVCC = (12, 0)  # C++20
MEMORY_PER_JOB = 3 << 30

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",  # `#pragma unroll` is for the device's compiler
    "-Xptxas",
    "-v",  # the report that read_report() reads
    # The stable ABI of torch 2.11, as in setup.py.
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# The runtime is linked statically and shows none of its names: the binary imports where there is no CUDA, and meets no
# other copy. aoti_torch_get_current_cuda_stream is a weak symbol, so without libtorch named as needed it stays null.
LINK_FLAGS = [
    "-lcudart_static",
    "-lrt",
    "-ldl",
    "-lpthread",
    "-Wl,--exclude-libs,libcudart_static.a",
    "-Wl,--no-as-needed",
    "-ltorch",
    "-Wl,--as-needed",
]


class NoToolkit(Exception):
    """There is no CUDA toolkit that can be used; the message says why, and reads well after "but"."""


@dataclass(frozen=True)
class Toolkit:
    """One installed CUDA toolkit; ``architectures``: numbers of those nvcc compiles for."""

    nvcc: str
    version: str
    folder: Path
    libraries: Path
    architectures: frozenset[str]


def _output(*command: str) -> str:
    """What a command prints, on either stream."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoToolkit(f"{command[0]} does not run ({error})") from error
    if done.returncode != 0:
        raise NoToolkit(f"{shlex.join(command)} failed: {done.stdout.strip()}")
    return done.stdout


def find_toolkit() -> Toolkit:
    """The toolkit of ``CUDA_HOME`` if that is set, else of the nvcc on PATH; raises `NoToolkit`.

    Its folder is asked for, not derived from nvcc's path: nvcc may be a wrapper that lies elsewhere.
    """
    home = os.environ.get("CUDA_HOME")
    looked_for = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    nvcc = shutil.which(looked_for)
    if nvcc is None:
        raise NoToolkit(f"there is no {looked_for} (CUDA_HOME is set)" if home else "there is no nvcc on PATH")
    version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if version is None or (int(version[1]), int(version[2])) < OLDEST_NVCC:
        found = f"{version[1]}.{version[2]}" if version else "of no known version"
        raise NoToolkit(f"{nvcc} is {found}, and C++20 needs {'.'.join(map(str, OLDEST_NVCC))}")
    steps = _output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null")
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    folder = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent).resolve()
    candidates = [folder / "lib64", folder / "lib", *sorted(folder.glob("targets/*/lib"))]
    libraries = next((path for path in candidates if (path / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise NoToolkit(f"the toolkit of {nvcc} in {folder} has no libcudart_static.a")
    known = frozenset(re.findall(r"\bsm_(\w+)", _output(nvcc, "--list-gpu-code")))
    return Toolkit(nvcc, f"{version[1]}.{version[2]}", folder, libraries, known)


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _asked_architectures(asked: str) -> list[str]:
    """The entries of ``TORCH_CUDA_ARCH_LIST`` without dots and ``+PTX``: the newest always comes as PTX too."""
    names = []
    for entry in re.split(r"[;\s]+", asked):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: {entry!r} is not an architecture; expected numbers, not names of "
                "GPU generations, such as '8.0;9.0a;10.0+PTX'"
            )
        names.append("".join(match.groups()[:3]))
    return names


def pick_architectures(asked: str | None, known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Architectures to compile for, oldest first, and a remark on each that is left out.

    ``asked``: the value of ``TORCH_CUDA_ARCH_LIST``; ``known``: what nvcc compiles for. 9.0 is taken for 9.0a, with
    which the same GPUs have all their instructions.
    """
    asked = (asked or "").strip("; \t\n")
    picked, remarks = set(), []
    for name in _asked_architectures(asked) if asked else DEFAULT_ARCHITECTURES:
        if _number(name) < OLDEST_ARCHITECTURE:
            remarks.append(f"no CUDA kernels for sm_{name}: they need sm_{OLDEST_ARCHITECTURE} or newer")
        elif name in known or str(_number(name)) in known:
            picked.add("90a" if name == "90" else name)
        elif asked:
            there = ", ".join(sorted(known, key=_number))
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked!r}: this nvcc does not know sm_{name}; it knows {there}")
        else:
            remarks.append(f"no CUDA kernels for sm_{name}: this nvcc does not know it")
    if not picked:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked!r}: the CUDA kernels need sm_{OLDEST_ARCHITECTURE} or newer")
    return sorted(picked, key=lambda name: (_number(name), name)), remarks


def is_sm90_only(source: Path) -> bool:
    return source.stem.endswith("_sm90")


def architectures_of(source: Path, architectures: Sequence[str]) -> list[str]:
    """Those of ``architectures`` that a file is compiled for: 90a alone for ``*_sm90.cu``, and maybe none."""
    return [name for name in architectures if name == "90a" or not is_sm90_only(source)]


def macros(architectures: Sequence[str]) -> list[str]:
    """What the other files are told of ``*_sm90.cu``: nothing, or that they are left out."""
    return [] if "90a" in architectures else ["-DFFATTR_NO_SM90"]


def code_flags(source: Path, architectures: Sequence[str]) -> list[str]:
    """The ``-gencode`` arguments of a file: machine code, and PTX for GPUs that are newer than every architecture.

    PTX of an architecture with a letter runs nowhere else, so it is made for the newest without one.
    """
    flags = []
    plain = [name for name in architectures if name.isdigit()]
    for name in architectures_of(source, architectures):
        code = f"[compute_{name},sm_{name}]" if plain[-1:] == [name] else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={code}"]
    if not plain and not is_sm90_only(source):
        virtual = f"compute_{_number(architectures[-1])}"
        flags += ["-gencode", f"arch={virtual},code={virtual}"]
    return flags


@dataclass(frozen=True)
class Object:
    """One .cu file and the object made of it. Beside the object lie its command and what nvcc printed."""

    source: Path
    path: Path
    command: list[str]
    versions: str

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    @property
    def _made_by(self) -> Path:
        return self.path.with_suffix(".command")

    @property
    def _wanted(self) -> str:
        return f"{shlex.join(self.command)}\n# {self.versions}\n"

    def is_current(self, dependencies: Iterable[Path]) -> bool:
        """Made by this very command from what the source and ``dependencies`` are now."""
        if not (self.path.exists() and self.log.exists() and self._made_by.exists()):
            return False
        made = self.path.stat().st_mtime
        changed = any(path.stat().st_mtime > made for path in (self.source, *dependencies))
        return not changed and self._made_by.read_text() == self._wanted

    def make(self, threads: int) -> str:
        """Compiles; returns what was done. Raises SystemExit with the command and what nvcc said."""
        start = time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._made_by.unlink(missing_ok=True)
        command = [*self.command, "--threads", str(threads)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise SystemExit(f"nvcc failed on {self.source.name}:\n{shlex.join(command)}\n{done.stdout}")
        self.log.write_text(done.stdout)
        # The time at which compiling started, so that a source saved meanwhile counts as changed.
        os.utime(self.path, (start, start))
        self._made_by.write_text(self._wanted)
        remarks = "".join(f"\n{line}" for line in done.stdout.splitlines() if not _is_report(line))
        return f"compiled {self.source.name} in {time.time() - start:.0f} s{remarks}"


def objects(
    toolkit: Toolkit, csrc: Path, folder: Path, architectures: Sequence[str], torch_include: str, torch_version: str
) -> list[Object]:
    """What is to be made of the .cu files below ``csrc``, in ``folder``."""
    compiler = ["-ccbin", os.environ["CXX"]] if shutil.which(os.environ.get("CXX", "")) else []
    made = []
    for source in sorted(csrc.rglob("*.cu")):
        code = code_flags(source, architectures)
        if code:
            path = (folder / source.relative_to(csrc)).with_suffix(".o")
            flags = [*COMPILE_FLAGS, *compiler, *macros(architectures), "-isystem", torch_include]
            command = [toolkit.nvcc, "-c", str(source), "-o", str(path), *flags, *code]
            made.append(Object(source, path, command, f"nvcc {toolkit.version}, torch {torch_version}"))
    return made


def job_count() -> int:
    """How many compilers may run at once: ``MAX_JOBS``, or one a core as far as memory goes."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return max(1, min(cores, int(available[1]) * 1024 // MEMORY_PER_JOB)) if available else cores


def make_all(wanted: Sequence[Object], dependencies: Sequence[Path]) -> None:
    """Makes the objects that are not current, in parallel; the first failure ends it with SystemExit."""
    stale = [item for item in wanted if not item.is_current(dependencies)]
    print(f"{len(stale)} of {len(wanted)} CUDA files to compile", flush=True)
    jobs = job_count()
    # Cores that are left where there are few files compile for several architectures at once.
    threads = max(1, jobs // max(1, len(stale)))
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(item.make, threads) for item in stale]
        try:
            for future in as_completed(futures):
                print(future.result(), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_ENTRY = re.compile(r"Compiling entry function '(.+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_WARNING = re.compile(r"ptxas (?:warning *:|info *: *\(C\d+\))")


def _is_report(line: str) -> bool:
    """Whether a line of nvcc's output is for the record alone, rather than something to show."""
    silent = line.startswith("ptxas info") and "Performance Loss" not in line
    return silent or bool(_FRAME.search(line)) or not line.strip()


def _amount(line: str, pattern: str) -> int | None:
    match = re.search(pattern, line)
    return int(match[1]) if match else None


def read_report(log: str, source: str) -> list[dict[str, Any]]:
    """One record per kernel and architecture from what ``ptxas -v`` printed, with mangled names.

    A warning names its kernel and comes before or after its other lines; those that differ in the line of the PTX are
    kept once. A function that is called, not inlined, is counted with the kernel whose lines stand before its own.
    """
    records: list[dict[str, Any]] = []
    early: dict[str, list[str]] = {}  # warnings of kernels whose lines are still to come
    for line in log.splitlines():
        if _WARNING.match(line):
            name = next(iter(re.findall(r"'([^']+)'|(?:function|entry) (\w+)", line)[::-1]), ("", ""))
            early.setdefault("".join(name), []).append(re.sub(r" in around line \d+", "", line.strip()))
        elif match := _ENTRY.search(line):
            record: dict[str, Any] = {"source": source, "architecture": match[2], "kernel": match[1], "registers": 0}
            record |= {"stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0, "barriers": None}
            records.append(record | {"warnings": list(dict.fromkeys(early.pop(match[1], [])))})
        elif (match := _FRAME.search(line)) and records:
            records[-1]["stack"] = max(records[-1]["stack"], int(match[1]))
            records[-1]["spill_stores"] += int(match[2])
            records[-1]["spill_loads"] += int(match[3])
        elif (match := _USED.search(line)) and records:
            used = {"registers": int(match[1]), "barriers": _amount(line, r"used (\d+) barriers")}
            cumulative = _amount(line, r"(\d+) bytes cumulative stack") or 0
            used |= {"shared": _amount(line, r"(\d+) bytes smem") or 0, "stack": max(records[-1]["stack"], cumulative)}
            records[-1] |= used
    for name, lines in early.items():  # those that came after, or name no kernel
        found = [record for record in records if record["kernel"] == name] or records
        for record in found[-1:]:
            record["warnings"] += dict.fromkeys(lines)
    return records


def _short(name: str) -> str:
    """A demangled name without this project's namespaces."""
    return re.sub(r"\(anonymous namespace\)::|\bffattr::(?:[a-z_0-9]+::)*", "", name)


def demangled(names: Sequence[str], toolkit: Path) -> dict[str, str]:
    """Readable names without parameters, or the names themselves where no demangler is found."""
    tools = [toolkit / "bin" / "cu++filt", "cu++filt", "c++filt"]
    tool = next((path for path in map(shutil.which, map(str, tools)) if path), None)
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool, "-p"], input="\n".join(names), text=True, capture_output=True)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or len(lines) != len(names):
        return {name: name for name in names}
    return {name: _short(line) for name, line in zip(names, lines, strict=True)}


def kernels(made: Iterable[Object], toolkit: Path) -> list[dict[str, Any]]:
    """The record of every kernel in the objects, from the logs beside them; by file, architecture and name."""
    records = [record for item in made for record in read_report(item.log.read_text(), item.source.name)]
    names = demangled(sorted({record["kernel"] for record in records}), toolkit)
    readable = [record | {"kernel": names[record["kernel"]]} for record in records]
    return sorted(readable, key=lambda record: (record["source"], _number(record["architecture"]), record["kernel"]))
