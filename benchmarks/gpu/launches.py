"""Counts what a whole layer asks of a GPU, without one: kernels started, waits for results, copies from the CPU.

    python benchmarks/gpu/launches.py                     # every shape, by Triton and by CUDA
    python benchmarks/gpu/launches.py --shape bert-base --backend cuda --each

Tensors without numbers (PyTorch's meta device) stand for those on a GPU, and say that they are. Every call that PyTorch
dispatches counts as one kernel, but for those that only name memory (views, sizes, allocations); a kernel of Triton's
is one, and so is an operator of `ffattr_cuda`, which starts one to three. A test holds the counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ffattr.bench.cases import SHAPES, Case, Size
from ffattr.bench.run import prepare_run
from ffattr.decomposition.affine import Linear, Norm
from ffattr.engine.planning import plan as planning

__all__ = ["DEVICE", "Counts", "count_launches", "count_layer"]

DEVICE = torch.device("meta")
TOKENS, BUDGET = 128, 32 << 30

_FREE = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift_fresh",
    "aten::detach",
    "prim::device",
}
"""What only names memory, beside the views that schemas tell."""

_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
"""What has to know numbers before it can go on."""


@dataclass
class Counts:
    """What was asked of the GPU: ``kernels`` and ``waits`` by the name of what asked, and copies of ``bytes`` from the
    CPU by their sizes."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: list[int] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())


class _Pretend(TorchFunctionMode):
    """Has tensors of the stand-in say that they are on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].device == DEVICE
        return func(*args, **(kwargs or {}))


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.name()
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if name == "aten::_local_scalar_dense" and given[0].device == DEVICE:
            self.counts.waits[name] += 1
            return given[0].dtype == torch.bool or 1  # what is asked of a layer is whether all went well
        if name == "aten::_to_copy" and given[0].device == DEVICE and kwargs.get("device") == torch.device("cpu"):
            self.counts.waits[name] += 1
            return torch.zeros(given[0].shape, dtype=given[0].dtype)
        if name in _WAITS and given[0].device == DEVICE:
            self.counts.waits[name] += 1
        out = func(*args, **kwargs)
        made = [one for one in tree_flatten(out)[0] if isinstance(one, Tensor)]
        if not any(one.device == DEVICE for one in made) or name in _FREE or func.is_view:
            return out
        if any(one.device != DEVICE and one.dim() for one in given):
            self.counts.copies += [one.nbytes for one in given if one.device != DEVICE and one.dim()]
        if any(one.numel() for one in made):
            self.counts.kernels[name] += 1
        return out


def _start_nothing(counts: Counts) -> Callable[..., None]:
    """Makes what stands in the place of Triton's launch: a kernel is counted, and nothing runs."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        counts.kernels[f"triton::{getattr(kernel, '__name__', kernel)}"] += 1

    return run


@contextmanager
def count_launches() -> Iterator[Counts]:
    """Counts what is asked of `DEVICE`; Triton's kernels and the CUDA operators start nothing."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counts = Counts()
    properties = SimpleNamespace(major=9, minor=0, name="NVIDIA H200", multi_processor_count=132)
    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", _start_nothing(counts)))
        stack.enter_context(mock.patch.object(torch.cuda, "device", return_value=nullcontext()))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        stack.enter_context(mock.patch.object(planning, "default_budget", return_value=(BUDGET, BUDGET)))
        stack.enter_context(_Pretend())
        stack.enter_context(_Count(counts))
        yield counts


def _name_memory(case: Case) -> Case:
    """The case without numbers."""

    def move(part: Linear | Norm) -> Linear | Norm:
        weight, bias = (None if one is None else one.to(DEVICE) for one in (part.weight, part.bias))
        found: Linear | Norm = replace(part, weight=weight, bias=bias)  # type: ignore[arg-type]
        return found

    attention = replace(case.attention, query=case.attention.query.to(DEVICE), key=case.attention.key.to(DEVICE))
    return Case(case.weights.map_parameters(move), case.x.to(DEVICE), attention)


def count_layer(size: Size, backend: str, method: str = "direct", all_scopes: bool = False) -> Counts:
    """Counts one layer of `TOKENS` tokens with bfloat16 products, whose matrices of the weights alone lie ready: the
    feed-forward maps, or with ``all_scopes`` those of attention too."""
    case = _name_memory(Case.draw_random(size, TOKENS))
    scopes = (*case.narrow_scopes, *case.wide_scopes) if all_scopes else case.wide_scopes
    with count_launches():
        run, _ = prepare_run(case, backend, method, scopes, None, torch.bfloat16)
        run()
    with count_launches() as counts:
        run()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--backend", choices=("triton", "cuda"), nargs="+", default=["triton", "cuda"])
    parser.add_argument("--each", action="store_true", help="also what the kernels are")
    asked = parser.parse_args()
    print("shape, backend, scopes: kernels, waits, copies from the CPU")
    for shape, backend, all_scopes in itertools.product(asked.shape, asked.backend, (False, True)):
        counts = count_layer(SHAPES[shape], backend, all_scopes=all_scopes)
        scopes = "all" if all_scopes else "feed-forward"
        print(f"{shape}, {backend}, {scopes}: {counts.launches}, {counts.waits.total()}, {len(counts.copies)}")
        if asked.each:
            print(*(f"  {count} {name}" for name, count in counts.kernels.most_common()), sep="\n")


if __name__ == "__main__":
    main()
