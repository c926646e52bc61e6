"""What `device.py` does in each of its two calls, in which order, and how long each part may take.

Every kernel is a process of its own: what hangs loses its own turn and nothing else. In a phase that compares, several
share the GPU; in one that times, each has it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CALLS", "CASES_PER_TEST", "GATED", "GPU_TESTS", "Phase", "Task", "name_kernel", "plan_call"]

CALLS = ("first", "second")
KERNEL_LIMIT = 12.0
COMPILERS = 12

DENSE, GATED, CAUSAL = "bert-base", "llama-7b", "gpt2"
# Shape and lengths of sequences; several share a call.
DENSE_CASES = (("minilm", (300, 212)), (DENSE, (512,)), (CAUSAL, (384,)))
GATED_CASES = ((GATED, (130, 126)),)
COMPARED = (  # backend, operator, dtype, gated, kernel
    *(("triton", "ff_norms", dtype, False, "") for dtype in ("bfloat16", "float8_e4m3fn", "float16", "float32")),
    *(("cuda", "ff_norms", dtype, False, "sm90") for dtype in ("bfloat16", "float8_e4m3fn", "float16")),
    *(("cuda", "ff_norms", dtype, False, "sm80") for dtype in ("bfloat16", "float32")),
    *(("triton", "ff_norms", dtype, True, "") for dtype in ("bfloat16", "float8_e4m3fn")),
    *(("cuda", "ff_norms", dtype, True, "sm90") for dtype in ("bfloat16", "float8_e4m3fn")),
    *(("cuda", "ff_norms", dtype, True, "sm80") for dtype in ("bfloat16", "float32")),
    ("triton", "operator_norms", "bfloat16", False, ""),
    ("triton", "operator_norms", "bfloat16", True, ""),
    *((backend, "gram_norms", "float32", False, "") for backend in ("triton", "cuda")),
    *((backend, "ig_slope", "float32", gated, "") for backend in ("triton", "cuda") for gated in (False, True)),
)
TIMED = (  # backend, operator, dtype, kernel, cases
    *(
        (backend, "ff_norms", "bfloat16", kernel, tuple((shape, (n,)) for shape, n in cases))
        for cases in (
            ((DENSE, 512), (DENSE, 2048)),
            ((GATED, 1024),),
            (("minilm", 512), ("minilm", 4096), (CAUSAL, 2048)),
        )
        for backend, kernel in (("triton", ""), ("cuda", "sm90"))
    ),
    *(
        (backend, "ff_norms", "float8_e4m3fn", kernel, ((DENSE, (2048,)), (GATED, (1024,))))
        for backend, kernel in (("triton", ""), ("cuda", "sm90"))
    ),
    ("triton", "operator_norms", "bfloat16", "", (("minilm", (4096,)),)),
    ("cuda", "ff_norms", "bfloat16", "sm80", ((DENSE, (2048,)), (GATED, (1024,)))),
    ("cuda", "ff_norms", "float32", "sm80", ((DENSE, (2048,)),)),
    *((backend, "gram_norms", "float32", "", ((DENSE, (2048,)),)) for backend in ("triton", "cuda")),
    *((backend, "ig_slope", "float32", "", ((DENSE, (2048,)), (GATED, (1024,)))) for backend in ("triton", "cuda")),
)
GPU_TESTS = ("tests/csrc/test_cuda_*.py", "tests/ops/triton/test_*.py", "tests/ops/test_selfcheck.py")
CASES_PER_TEST = 12


@dataclass(frozen=True)
class Task:
    """``kind`` is a method of `device_tasks.Tasks`, or the name of a command of `device.py`; ``expected`` seconds."""

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = KERNEL_LIMIT
    expected: float = 4.0
    lane: str = "gpu"


@dataclass(frozen=True)
class Phase:
    """Tasks that run within ``seconds``: so many at once on the GPU, and on the processor alone."""

    name: str
    seconds: float
    tasks: tuple[Task, ...]
    gpu: int = 1
    cpu: int = 0


def plan_call(call: str) -> list[Phase]:
    """Returns the phases of the first call (compile, compare, time, profile) or of the second (test, tune, use)."""
    return _plan_first() if call == "first" else _plan_second()


def _set_up(build_limit: float) -> tuple[Task, ...]:
    """What both calls begin with: the extension is built while the GPU is asked what it is and how fast."""
    return (
        Task("build", "build", limit=build_limit, expected=25, lane="cpu"),
        Task("machine", "machine", limit=20, expected=6),
        Task("rates", "rates", limit=20, expected=8),
    )


def _plan_first() -> list[Phase]:
    return [
        Phase(
            "prepare",
            35,
            (
                *_set_up(34),
                *_compilations(),
            ),
            cpu=COMPILERS + 1,
        ),
        Phase("compare", 75, tuple(_comparisons()), gpu=4),
        Phase("time", 80, tuple(_timings())),
        Phase(
            "profile",
            70,
            tuple(
                Task(
                    f"profile {backend}",
                    "profile",
                    {**_kernel(backend, "ff_norms", "bfloat16", kernel), "cases": ((DENSE, (1024,)),)},
                    limit=34,
                    expected=25,
                )
                for backend, kernel in (("triton", ""), ("cuda", "sm90"))
            ),
        ),
        Phase("layers", 30, tuple(_layers())),
    ]


def _plan_second() -> list[Phase]:
    return [
        Phase(
            "build",
            40,
            (
                *_set_up(39),
                *(
                    Task(
                        f"compile self-check, part {part + 1} of {COMPILERS}",
                        "compile",
                        {"part": part, "parts": COMPILERS},
                        limit=39,
                        expected=20,
                        lane="cpu",
                    )
                    for part in range(COMPILERS)
                ),
            ),
            cpu=COMPILERS + 1,
        ),
        Phase("tests", 105, (Task("tests", "tests", limit=104, expected=80, lane="cpu"),), cpu=1),
        Phase(
            "sanitize",
            40,
            tuple(Task(tool, tool, limit=20, expected=15) for tool in ("memcheck", "racecheck")),
        ),
        Phase(
            "use",
            70,
            tuple(
                Task(
                    f"attribute {backend}, T = {tokens}",
                    "attribute",
                    {"backend": backend, "tokens": tokens, "top": 32},
                    limit,
                    expected,
                )
                for backend, tokens, limit, expected in (
                    ("triton", 512, 15, 8),
                    ("torch", 512, 15, 8),
                    ("auto", 32768, 40, 25),
                )
            ),
        ),
        Phase(
            "tune",
            40,
            tuple(
                Task(f"tune {shape}, T = {tokens}", "tune", {"shape": shape, "tokens": tokens, "seconds": 12}, 19, 17)
                for shape, tokens in ((DENSE, 1024), (GATED, 1024))
            ),
        ),
    ]


def _kernel(backend: str, operator: str, dtype: str, kernel: str) -> dict[str, Any]:
    return {"backend": backend, "operator": operator, "dtype": dtype, "kernel": kernel}


def name_kernel(backend: str, operator: str, dtype: str, kernel: str, gated: bool | None = None) -> str:
    parts = [backend, kernel, operator, dtype, {True: "gated", False: "dense", None: ""}[gated]]
    return " ".join(filter(None, parts))


def _compilations() -> Iterator[Task]:
    """The kernels of all later phases. The number of queries chooses tiles, so lengths are those that follow."""
    jobs: dict[tuple[str, str, str], list[list[int]]] = {}

    def want(operator: str, dtype: str, shape: str, lengths: tuple[int, ...]) -> None:
        jobs.setdefault((operator, dtype, shape), []).append([sum(lengths)])

    for backend, operator, dtype, gated, _ in COMPARED:
        for shape, lengths in GATED_CASES if gated else DENSE_CASES:
            if backend == "triton":
                want(operator, dtype, shape, lengths)
    for backend, operator, dtype, _, cases in TIMED:
        for shape, lengths in cases:
            if backend == "triton":
                want(operator, dtype, shape, lengths)
    slowest_first = sorted(jobs, key=lambda job: (job[0] != "ff_norms", job[2] != GATED))
    for operator, dtype, shape in slowest_first:
        arguments = {"operator": operator, "dtype": dtype, "shape": shape, "lengths": jobs[operator, dtype, shape]}
        yield Task(f"compile {operator} {dtype} {shape}", "compile", arguments, 30, 8, "cpu")


def _comparisons() -> Iterator[Task]:
    for backend, operator, dtype, gated, kernel in COMPARED:
        arguments = {**_kernel(backend, operator, dtype, kernel), "cases": GATED_CASES if gated else DENSE_CASES}
        yield Task(f"compare {name_kernel(backend, operator, dtype, kernel, gated)}", "correct", arguments, expected=6)


def _timings() -> Iterator[Task]:
    for backend, operator, dtype, kernel, cases in TIMED:
        arguments = {**_kernel(backend, operator, dtype, kernel), "cases": cases}
        shapes = ", ".join(f"{shape} {sum(lengths)}" for shape, lengths in cases)
        yield Task(f"time {name_kernel(backend, operator, dtype, kernel)}: {shapes}", "time", arguments)


def _layers() -> Iterator[Task]:
    for shape, tokens, backend in (
        (DENSE, 512, "triton"),
        (DENSE, 512, "cuda"),
        (DENSE, 512, "materialising"),
        (GATED, 1024, "triton"),
        (GATED, 1024, "cuda"),
    ):
        arguments = {"shape": shape, "tokens": tokens, "backend": backend, "method": "direct", "dtype": "bfloat16"}
        yield Task(f"layer {shape}, T = {tokens}, {backend}", "layer", arguments)
