"""What the compiled CUDA kernels take of a GPU, and what their machine code contains: no GPU is needed.

    python benchmarks/gpu/resources_cuda.py [--capability 80 90 100] [--json FILE]

Registers and stack of a thread are ptxas's own, kept from the build. The rest is counted in the SASS of the library
with the CUDA toolkit's cuobjdump or the one that comes with Triton, in 10 seconds of two cores; without either, those
columns are left out. Shared memory is not shown: nearly all of it is dynamic.

"matrix" counts matrix instructions; "copies" asynchronous ones of 16 bytes into shared memory; "TMA" its loads, and of
them those to several blocks; "loads" and "stores" those of 16 bytes in global memory; "local" what uses local memory,
where registers are spilled, and of that the part in loops with matrix instructions. The main loop is the one with most
matrix instructions outside loops within it, of equals the longest; shown are all its instructions, loops within it
included, those matrix instructions, and its waits for wgmma.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ffattr.ops import LIBRARY

CSRC = Path(__file__).resolve().parents[2] / "csrc"
if str(CSRC) not in sys.path:
    sys.path.insert(0, str(CSRC))

import build_cuda  # noqa: E402

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")  # in the name of an anonymous namespace
MATRIX = re.compile(r"[A-Z]*MMA\.\w+")  # with its shape
LOCAL = r"(LDL|STL)\b"
NEVER_PASSED = {"EXIT", "RET", "BRA", "BRX", "JMP", "JMX"}  # where nothing says that only some threads go


class Missing(Exception):
    """What there is nothing to say of, and why."""


class Instruction(NamedTuple):
    """A line of SASS; ``guard`` is the predicate it runs under, or empty."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def is_idle(self) -> bool:
        """Does nothing, but may be where a branch goes."""
        return self.opcode == "NOP" or self.guard == "!PT"

    @property
    def is_matrix(self) -> bool:
        """A product; one into RZ only closes a group of them."""
        return MATRIX.match(self.opcode) is not None and not self.operands.startswith("RZ,")

    @property
    def target(self) -> int | None:
        """Where a branch goes, or a call: ptxas makes one of a loop's end that is not returned from."""
        found = re.search(r"0x[0-9a-f]+$", self.operands)
        return int(found[0], 16) if found and self.opcode.startswith(("BRA", "CALL")) else None

    @property
    def is_passed(self) -> bool:
        """Whether the next instruction may follow it. Branches take further conditions before their target."""
        return bool(self.guard) or self.opcode.split(".")[0] not in NEVER_PASSED or "," in self.operands


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code contains, see above."""

    instructions: int
    matrix: dict[str, int]
    copies: int
    tma_loads: int
    multicast: int
    loads: int
    stores: int
    local: int
    local_in_loops: int
    loop: int
    loop_matrix: dict[str, int]
    loop_waits: int


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """Mangled name and instructions of every function in what ``cuobjdump -sass`` prints."""
    name, code = "", list[Instruction]()
    for line in lines:
        if match := LINE.match(line.lstrip()):
            address, guard, opcode, operands = match.groups()
            code.append(Instruction(int(address, 16), guard or "", opcode, operands.strip()))
        elif "Function : " in line:
            if name:
                yield name, code
            name, code = line.split(" : ")[1].strip(), []
    if name:
        yield name, code


def reaching(source: int, header: int, before: Sequence[Sequence[int]]) -> set[int]:
    """From what ``source`` can be reached without passing ``header``, both included."""
    found, left = {header}, [source]
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left += before[i]
    return found


def loops(code: Sequence[Instruction]) -> list[set[int]]:
    """Which instructions, by index, each loop has: those between a branch back and where it leads to.

    What seldom runs lies behind a kernel's end. A branch back from there is no loop, as the kernel's beginning reaches
    it without passing the target; and what lies there may be part of a loop.
    """
    places = {instruction.address: i for i, instruction in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        if instruction.target in places:
            before[places[instruction.target]].append(i)
        if instruction.is_passed and i + 1 < len(code):
            before[i + 1].append(i)
    found = []
    for header, sources in enumerate(before):
        bodies = [reaching(source, header, before) for source in sources if source >= header]
        whole = set[int]().union(*(body for body in bodies if header == 0 or 0 not in body))
        if whole:
            found.append(whole)
    return found


def counted(code: Sequence[Instruction]) -> Code:
    def opcodes(of: Iterable[int]) -> Counter[str]:
        return Counter(code[i].opcode for i in of if not code[i].is_idle)

    every = opcodes(range(len(code)))

    def count(pattern: str, of: Counter[str] = every) -> int:
        return sum(times for opcode, times in of.items() if re.match(pattern, opcode))

    def shapes(of: Iterable[int]) -> dict[str, int]:
        return dict(Counter(MATRIX.findall(code[i].opcode)[0] for i in of))

    products = [i for i, instruction in enumerate(code) if instruction.is_matrix]
    with_products = [loop for loop in loops(code) if not loop.isdisjoint(products)] if products else []
    inner = {i: min((loop for loop in with_products if i in loop), key=len, default=set[int]()) for i in products}
    main = max(with_products, key=lambda loop: (list(inner.values()).count(loop), len(loop)), default=set[int]())
    in_loops = set[int]().union(*with_products)
    return Code(
        instructions=every.total(),
        matrix=shapes(products),
        copies=count(r"LDGSTS\b.*\.128\b"),
        tma_loads=count(r"UTMALDG\b"),
        multicast=count(r"UTMALDG\b.*\.MULTICAST\b"),
        loads=count(r"LDG\b.*\.128\b"),
        stores=count(r"STG\b.*\.128\b"),
        local=count(LOCAL),
        local_in_loops=count(LOCAL, opcodes(in_loops)),
        loop=opcodes(main).total(),
        loop_matrix=shapes(i for i in products if main and inner[i] == main),
        loop_waits=count(r"WARPGROUP\.DEPBAR\b", opcodes(main)),
    )


def find_cuobjdump() -> str:
    """The toolkit's of ``CUDA_HOME``, that on PATH, or Triton's; raises `Missing`."""
    home = os.environ.get("CUDA_HOME")
    for path in [*([f"{home}/bin/cuobjdump"] if home else []), "cuobjdump"]:
        if tool := shutil.which(path):
            return tool
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, RuntimeError):
        raise Missing("there is no cuobjdump in CUDA_HOME, on PATH or with Triton") from None


def output(*command: str | Path, folder: Path) -> Iterator[str]:
    """Lines of what a command prints; raises `Missing` at their end if it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            yield line
    if process.returncode != 0:
        raise Missing(f"{' '.join(map(str, command))} returned {process.returncode}: {line.strip()}")


def codes(kernels: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], Code]:
    """By source, architecture and readable name, of all that were compiled with one of these; raises `Missing`."""
    tool = find_cuobjdump()
    if LIBRARY is None:
        raise Missing("there is no libffattr")
    wanted = {(record["source"], record["architecture"]) for record in kernels}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        list(output(tool, "-xelf", "all", LIBRARY, folder=folder))
        files = []
        for file in sorted(folder.glob("*.cubin")):  # one for each source and architecture
            source = SOURCE.search(file.read_bytes().decode("latin-1"))
            architecture = re.search(r"\.sm_(\w+)\.cubin$", file.name)
            if source and architecture and (f"{source[1]}.cu", architecture[1]) in wanted:
                files.append((f"{source[1]}.cu", architecture[1], file))

        def read(file: Path) -> dict[str, Code]:
            return {name: counted(code) for name, code in functions(output(tool, "-sass", file, folder=folder))}

        every = list(pool.map(read, [file for _, _, file in files]))  # most of the time is cuobjdump's
    try:
        toolkit = build_cuda.find_toolkit().folder
    except build_cuda.NoToolkit:
        toolkit = Path()
    names = build_cuda.demangled(sorted(set().union(*every)), toolkit)  # by what has named them in the build
    return {
        (source, architecture, names[name]): code
        for (source, architecture, _), some in zip(files, every, strict=True)
        for name, code in some.items()
    }


def capability(architecture: str) -> int:
    """80 is 8.0; 90a is 90 too."""
    return int(re.sub(r"\D", "", architecture))


def rows(capabilities: Collection[int] = (), sources: Collection[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """What every kernel takes and contains, for these GPUs and of these files or all; what is missing and why."""
    try:
        from ffattr._build_info import BUILD
    except ImportError:
        return [], "No CUDA kernels: the package is not built"
    build: dict[str, Any] = BUILD
    if not build.get("cuda"):
        return [], f"No CUDA kernels: {build.get('cuda_reason', 'the package was built without them')}"
    kernels = [
        {"capability": capability(record["architecture"]), **record}
        for record in build["kernels"]
        if not capabilities or capability(record["architecture"]) in capabilities
        if not sources or record["source"] in sources
    ]
    if not kernels:
        return [], f"No such CUDA kernels: they were built for {', '.join(build['architectures'])}"
    try:
        found = codes(kernels)
    except Missing as missing:
        return kernels, f"No SASS of the CUDA kernels: {missing}"
    unknown = 0
    for record in kernels:
        code = found.get((record["source"], record["architecture"], record["kernel"]))
        if code is None:
            unknown += 1
        else:
            record |= asdict(code)
    return kernels, f"No SASS of {unknown} CUDA kernels: their names are not in the extension" if unknown else ""


def of_which(all_of_them: int, some: int) -> str:
    return f"{all_of_them} ({some})" if all_of_them else ""


def table(kernels: list[dict[str, Any]]) -> Table:
    shown = Table(title="CUDA kernels")
    for name in ("source", "kernel"):
        shown.add_column(name, no_wrap=True)
    with_code = any("instructions" in row for row in kernels)
    of_code = ("instructions", "matrix", "copies", "TMA (to several)", "loads", "stores", "local (in loops)")
    for name in ("GPU", "registers", "stack B", *(of_code if with_code else ())):
        shown.add_column(name)
    if with_code:
        shown.add_column("main loop")
    for row in kernels:
        cells = [row["source"], row["kernel"], f"sm_{row['architecture']}", row["registers"], row["stack"]]
        if "instructions" in row:
            kinds: Counter[str] = Counter()
            for shape, count in row["matrix"].items():
                kinds[shape.split(".")[0]] += count
            loop = f"{row['loop']}, {sum(row['loop_matrix'].values())}, {row['loop_waits']}" if row["loop"] else ""
            cells += [
                row["instructions"],
                ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
                row["copies"],
                of_which(row["tma_loads"], row["multicast"]),
                *(row[name] for name in ("loads", "stores")),
                of_which(row["local"], row["local_in_loops"]),
                loop,
            ]
        shown.add_row(*(str(cell or "") for cell in cells))
    return shown


def show(capabilities: Collection[int] = ()) -> list[dict[str, Any]]:
    """Prints the table, or why there is none; returns its rows."""
    kernels, missing = rows(capabilities)
    console = Console(width=None if Console().is_terminal else 200)
    if kernels:
        console.print(table(kernels))
    if missing:
        console.print(missing, soft_wrap=True, markup=False)
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=(), help="of these GPUs alone: 80 is 8.0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    asked = parser.parse_args()
    found = show(asked.capability)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
