"""Compiles an operator ahead of time into a package, which `run_package.cpp` runs without Python.

python benchmarks/examples/export_norms.py norms.pt2
"""

import math
import sys

import torch
from torch import Tensor

import ffattr.ops  # noqa: F401  declares the operators


class Norms(torch.nn.Module):
    """Norms of what five queries have from seven keys by two heads and the feed-forward block, ``[2, 5, 7]``."""

    def forward(
        self, alpha: Tensor, position: Tensor, features: Tensor, slope: Tensor, down: Tensor, residual: Tensor
    ) -> Tensor:
        norms: Tensor = torch.ops.ffattr.ff_norms(
            alpha, position, features, slope, down, None, residual, None, None, None, False
        )
        return norms


def make_numbers(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).sin().reshape(shape)


def make_arguments() -> tuple[Tensor, ...]:
    """Makes alpha ``[2, 5, 7]``, position ``[5]``, features ``[1, 7, 3, 8]``, slope, down and residual."""
    return (
        make_numbers(2, 5, 7).abs(),
        torch.arange(5),
        make_numbers(1, 7, 3, 8),
        make_numbers(1, 5, 8),
        make_numbers(8, 4),
        make_numbers(7, 3, 4),
    )


def main(package: str) -> None:
    arguments = make_arguments()
    program = torch.export.export(Norms(), arguments)
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    print(f"{package}: norms of {Norms()(*arguments).sum().item():.6g} together")


if __name__ == "__main__":
    main(sys.argv[1])
