"""What `device.py` measures of layers, in which order, and how long each thing will take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["FIRST", "SHAPES", "Estimate", "Job", "dtype_of", "is_cuda", "jobs"]

DIRECT, CUDA_DIRECT = "Triton direct", "CUDA direct"
VARIANTS = (
    *(DIRECT, CUDA_DIRECT, f"{DIRECT}, fp8", f"{CUDA_DIRECT}, fp8", "Triton operator"),
    *("PyTorch, materialising", "PyTorch, chunked"),
)
COMPILED = "PyTorch, chunked, compiled"
NARROW = ("Triton, attention level", "CUDA, attention level")
BACKENDS = ("triton", "cuda")
FIRST = (("bert-base", 512), ("bert-base", 1024), ("llama-7b", 1024))
SHAPES = ("bert-base", "llama-7b", "gpt2", "minilm")
LENGTHS = (2048, 256, 128, 512, 1024, 4096, 8192)

# Until they are measured: operations per second, and seconds to compile.
GUESSED_RATES = {DIRECT: 2e14, f"{DIRECT}, fp8": 2e14, "Triton operator": 5e13, COMPILED: 3e13}
GUESSED_RATES |= {CUDA_DIRECT: 1e14, f"{CUDA_DIRECT}, fp8": 1e14}
SLOWEST = 1e13
COMPILING, COMPILING_GRAPHS = 12.0, 45.0

Job = dict[str, Any]


def jobs(shapes: list[str], dry_run: bool) -> Iterator[Job]:
    """All that is measured of layers, the most telling first."""
    if dry_run:
        first, rest, batch = [(shape, 2) for shape in shapes[:1]], [(shape, 2) for shape in shapes[1:]], (3, 2)
    else:
        first = [case for case in FIRST if case[0] in shapes]
        every = [(shape, tokens) for tokens in LENGTHS for shape in SHAPES if shape in shapes]
        rest, batch = [case for case in every if case not in first], (64, 128)
    for shape, tokens in first:
        for variant in (*VARIANTS, *NARROW):
            yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": variant}
        for backend in BACKENDS:
            yield {"kind": "slope", "shape": shape, "tokens": tokens, "backend": backend}
    many = {"kind": "batch", "shape": shapes[0], "sequences": batch[0], "tokens": batch[1]}
    for looped in (False, True):
        for backend in BACKENDS:
            yield {**many, "looped": looped, "backend": backend}
    for shape, tokens in first:
        yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": COMPILED}
    for shape, tokens in rest:
        for variant in VARIANTS:
            yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": variant}


def is_cuda(job: Job) -> bool:
    """Whether it runs a kernel of the backend "cuda"."""
    return job.get("backend") == "cuda" or str(job.get("variant")).startswith("CUDA")


def dtype_of(job: Job) -> str:
    """In which its kernels have to have passed the self-check."""
    return "float8_e4m3fn" if str(job.get("variant")).endswith("fp8") else "bfloat16"


class Estimate:
    """How long a job will take, from what the same variant has reached so far."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._compiled: set[tuple[str, str]] = set()

    def of(self, job: Job, flops: float) -> float:
        variant = str(job.get("variant", job["kind"]))
        once = flops / self._rates.get(variant, GUESSED_RATES.get(variant, SLOWEST))
        if variant == COMPILED:  # for every length anew
            setup = COMPILING_GRAPHS
        else:
            setup = 0.0 if is_cuda(job) or (variant, job["shape"]) in self._compiled else COMPILING
        return 2.0 + setup + 4 * once + min(10 * once, 3.0)

    def learn(self, job: Job, answer: dict[str, Any]) -> None:
        if answer.get("seconds"):
            variant = str(job.get("variant", job["kind"]))
            self._compiled.add((variant, job["shape"]))
            if answer["flops"]:
                self._rates[variant] = answer["flops"] / answer["seconds"]
