"""What GPU kernels take of a GPU, from compiling ahead of time: no GPU is needed.

    python benchmarks/gpu/resources.py [--capability 80 90 100] [--usual] [--workers 2] [--json FILE]

First Triton's, of the wide maps, in every tile that the rules of `ffattr.ops.triton.configs` give; ``--usual`` leaves
those for at most 32 heads in bfloat16 and float8, many queries and a model as wide as BERT-base, and "own" on sm_90
only. They are "direct", the same for queries' "own" keys, and "build" and "apply" of the operators. One takes 2 to 5
seconds of a core, all of them 7 minutes of two; Triton keeps what it has compiled (``TRITON_CACHE_DIR``). Not in its
interpreter mode. Then the CUDA kernels, if they were built, but not with ``--usual``: see `resources_cuda.py`.

Registers and stack of a thread are read from the binary that Triton would launch; the stack holds spilled registers and
nothing else. "matrix" counts matrix instructions: mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import resources_cuda
import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ffattr.ops.reduction import Reduction
from ffattr.ops.triton import configs
from ffattr.ops.triton.configs import Config, Shape
from ffattr.ops.triton.ff_norms import direct_kernel
from ffattr.ops.triton.operator_norms import apply_kernel, build_kernel
from ffattr.ops.triton.tiles import product_precision

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HEADS, STREAMS, WIDTHS, QUERIES = [12, 32, 64, 128], [1, 2], [384, 768], [64, 512]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]  # float16 compiles like bfloat16
HEAD_DIM = 64  # almost every model's; a smaller one takes less


@dataclass(frozen=True)
class Resources:
    """``registers`` and ``spilled`` bytes of a thread, ``shared`` bytes of a program."""

    registers: int
    spilled: int
    shared: int
    matrix: int
    tma_loads: int


@dataclass(frozen=True)
class Case:
    """A kernel to compile: "direct", "own" (the same for queries' own keys), "build" or "apply"; ``reduction`` is what
    the first two and the last reduce vectors to."""

    kernel: str
    shape: Shape
    config: Config
    reduction: Reduction = "l2"

    @property
    def capability(self) -> int:
        major, minor = self.shape.capability
        return int(10 * major + minor)

    @property
    def function(self) -> Any:
        return {"build": build_kernel, "apply": apply_kernel}.get(self.kernel, direct_kernel)

    @property
    def arguments(self) -> dict[str, Any]:
        if self.kernel == "build":
            return build_arguments(self.shape, self.config)
        if self.kernel == "apply":
            return apply_arguments(self.shape, self.config, self.reduction)
        return direct_arguments(self.shape, self.config, self.kernel == "own", self.reduction)

    def row(self) -> dict[str, Any]:
        """What it is and takes; ``streams`` or ``heads`` (as padded) is None where the kernel is the same for all."""
        arguments = self.arguments
        return {
            "kernel": self.kernel,
            "reduction": self.reduction,
            "capability": self.capability,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "streams": arguments.get("STREAMS"),
            "heads": arguments.get("HEADS"),
            **asdict(self.config),
            **asdict(compiled(self.function, arguments, self.capability, self.config)),
        }


def cases(capability: int, usual: bool = False) -> Iterator[Case]:
    """Every kernel that the rules can ask for on a GPU of this compute capability (80 is 8.0), each once."""
    seen = set()
    heads, widths, queries, dtypes = HEADS, WIDTHS, QUERIES, DTYPES
    if usual:
        heads, widths, queries, dtypes = heads[:2], widths[-1:], queries[-1:], dtypes[1:]
    for dtype, h, streams, width, n in itertools.product(dtypes, heads, STREAMS, widths, queries):
        shape = Shape(h, streams, width, n, dtype, divmod(capability, 10))
        kernels = ("direct",) if usual and capability != 90 else ("direct", "own")
        found = [Case(kernel, shape, configs.choose_direct(shape)) for kernel in kernels]
        if dtype != torch.float8_e4m3fn:
            found += [
                Case("build", shape, configs.choose_build(shape)),
                Case("apply", shape, configs.choose_apply(shape, HEAD_DIM)),
            ]
            if capability == 90 and h == heads[0]:  # the main loops are the same
                chosen = [("direct", configs.choose_direct(shape)), ("apply", configs.choose_apply(shape, HEAD_DIM))]
                found += [Case(kernel, shape, config, "l1") for kernel, config in chosen]
                found += [Case(kernel, shape, configs.halve_columns(config), "alti") for kernel, config in chosen]
        elif capability < 90:
            continue
        for case in found:
            key = (case.kernel, tuple(case.arguments.items()), case.config)  # other shapes make the same kernel
            if key not in seen:
                seen.add(key)
                yield case


def compiled(kernel: Any, arguments: dict[str, Any], capability: int, config: Config) -> Resources:
    """``arguments``: Triton type of every run-time argument; anything that is not a type is a constant."""
    types = {name: arguments[name] if is_type(arguments[name]) else "constexpr" for name in kernel.arg_names}
    constants = {name: arguments[name] for name in kernel.arg_names if types[name] == "constexpr"}
    # Tensors are aligned; F and d, the only sizes that strides are made of, are multiples of 16 in models.
    aligned = {"neurons", "width"}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (name in aligned and kind != "constexpr")
    }
    binary = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True},
    )
    registers, stack = registers_and_stack(binary.asm["cubin"])
    ptx = binary.asm["ptx"]
    return Resources(
        registers,
        stack,
        binary.metadata.shared,
        ptx.count(INSTRUCTION[capability]),
        ptx.count("cp.async.bulk.tensor"),
    )


def is_type(value: object) -> bool:
    return isinstance(value, str) and (value.startswith(("*", "tensordesc")) or value in ("i32", "fp32"))


def registers_and_stack(binary: bytes) -> tuple[int, int]:
    """Of a thread. ptxas says so too, but not of a binary that Triton has kept, and another run of it would need to be
    told all that Triton tells it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"{command[0]} printed {said!r}, expected REG: and STACK:")
    return int(found[1]), int(found[2])


def matrix_type(of: str, config: Config, *block: int) -> str:
    return f"tensordesc<{of}{list(block)}>".replace(" ", "") if config.tma else f"*{of}"


def norms(shape: Shape) -> dict[str, str | None]:
    return dict.fromkeys(("residual_scale", "gamma", "norm_scale"), "*fp32" if shape.streams == 1 else None)


def reduction_arguments(reduction: Reduction) -> dict[str, Any]:
    """Of norms the third is centred, which is done apart for anything else."""
    return {"totals": "*fp32" if reduction == "alti" else None, "L2": reduction == "l2", "CENTRE": reduction == "l2"}


def direct_arguments(shape: Shape, config: Config, own: bool = False, reduction: Reduction = "l2") -> dict[str, Any]:
    """All feed-forward scopes: of a post-LN layer, the longest epilogue there is, or of a gated, pre-LN one, whose down
    matrix is rotated."""
    float8 = shape.dtype == torch.float8_e4m3fn
    down, wide = TYPES[shape.dtype], "bf16" if float8 else TYPES[shape.dtype]
    heads = configs.padded_heads(shape.heads)

    def matrix(of: str, *block: int) -> str:
        return matrix_type(of, config, *block)

    return {
        "alpha": "*fp32",
        "position": "*i64",
        "features": matrix(wide, 1, heads, config.neurons),
        "own_features": f"*{wide}",
        "slope": matrix(wide, config.queries, config.neurons),
        "down": matrix(down, config.columns, config.neurons),
        "residual": matrix(wide, 1, heads, config.columns),
        "own_residual": f"*{wide}",
        **norms(shape),
        "down_scale": "*fp32" if float8 else None,
        "slope_size": "*fp32" if float8 else None,
        "feature_bound": "*fp32" if float8 else None,
        "blocks": None if shape.streams == 1 else "*i32",  # one sequence, or several
        "out": "*fp32",
        **dict.fromkeys(("queries", "columns", "keys", "neurons", "width", "heads"), "i32"),
        "OWN": own,
        "TRIANGULAR": shape.streams == 2 and reduction == "l2",
        "STREAMS": shape.streams,
        **reduction_arguments(reduction),
        "TMA": config.tma,
        "PRECISION": product_precision(torch.bfloat16 if float8 else shape.dtype),
        "HEADS": heads,
        "QUERIES": config.queries,
        "COLUMNS": config.columns,
        "NEURONS": config.neurons,
    }


def build_arguments(shape: Shape, config: Config) -> dict[str, Any]:
    wide = TYPES[shape.dtype]
    return {
        "maps": matrix_type(wide, config, config.queries, config.neurons),
        "slope": f"*{wide}",
        "down": matrix_type(wide, config, config.columns, config.neurons),
        "out": f"*{wide}",
        **dict.fromkeys(("first", "queries", "inner", "neurons", "width"), "i32"),
        "TRIANGULAR": shape.streams == 2,
        "STREAMS": shape.streams,
        "TMA": config.tma,
        "PRECISION": product_precision(shape.dtype),
        "ROWS": config.queries,
        "COLUMNS": config.columns,
        "NEURONS": config.neurons,
    }


def apply_arguments(shape: Shape, config: Config, reduction: Reduction = "l2") -> dict[str, Any]:
    wide = TYPES[shape.dtype]
    return {
        "weights": "*fp32",
        "sizes": "*fp32",
        "position": "*i64",
        "values": matrix_type(wide, config, config.queries, config.neurons),
        "operator": matrix_type(wide, config, config.neurons, config.columns),
        "own": f"*{wide}",
        "residual": f"*{wide}",
        **norms(shape),
        "out": "*fp32",
        **dict.fromkeys(("first", "batch", "queries", "keys", "columns", "heads", "head_dim", "width"), "i32"),
        **reduction_arguments(reduction),
        "EVEN": True,
        "TMA": config.tma,
        "PRECISION": product_precision(shape.dtype),
        "KEYS": config.queries,
        "COLUMNS": config.columns,
        "DEPTH": config.neurons,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        "kernel",
        "reduces to",
        "GPU",
        "dtype",
        "streams",
        "heads",
        "queries x columns x step",
        "warps",
        "stages",
        "TMA",
        *("registers", "spilled B", "shared KiB", "matrix", "TMA loads"),
    )
    for row in rows:
        shown.add_row(
            row["kernel"],
            row["reduction"] if row["kernel"] != "build" else "",
            f"sm_{row['capability']}",
            row["dtype"],
            *("any" if row[name] is None else str(row[name]) for name in ("streams", "heads")),
            " x ".join(str(row[name]) for name in ("queries", "columns", "neurons")),
            *(str(row[name]) for name in ("warps", "stages")),
            "yes" if row["tma"] else "no",
            str(row["registers"]),
            str(row["spilled"] or ""),
            f"{row['shared'] / 1024:.0f}",
            *(str(row[name]) for name in ("matrix", "tma_loads")),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", choices=list(INSTRUCTION), default=list(INSTRUCTION))
    parser.add_argument("--usual", action="store_true", help="Triton alone, and not every tile, see above")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    asked = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: Triton compiles nothing then; unset it")
    found = [case for capability in asked.capability for case in cases(capability, asked.usual)]
    # A forked process would have half of the threads that torch and rich have started.
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        rows = list(track(pool.map(Case.row, found), "compiling", len(found), console=Console(stderr=True)))
    Console(width=None if Console().is_terminal else 160).print(table(rows))
    if asked.usual:
        print("No CUDA kernels with --usual: python benchmarks/gpu/resources_cuda.py")
    else:
        rows += resources_cuda.show(asked.capability)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
