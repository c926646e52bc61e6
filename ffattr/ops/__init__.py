"""The four operators: what they compute, who computes them, and why another one cannot.

In come tensors of one layer: attention weights, and Gram matrices, features or values of keys. Out come the norms of
pairs, ``[N, M]`` or ``[2 or 3, N, M]``, and the Integrated-Gradients factors ``[S, N, F]``.

Read
    library.py          the compiled library, which declares the operators and has their C++ kernels
    schemas.inc         their schemas, for C++ and for Python
    contract.py         schemas, shapes and dtypes of the operators
    torch_kernels.py    the operators in plain PyTorch, in chunks of queries
    reduction.py        what vectors become where that is no norm
    mixed_operator.py   operator_norms with the heads mixed first, out of ff_norms
    backends.py         the implementations, and which one runs
    availability.py     why another one cannot run here; selfcheck.py: whether a GPU's kernels compute what PyTorch does
    out_of_memory.py    whether memory ran out, also where the error does not say so
    triton/             the operators as Triton kernels
"""

from .contract import MOST_HEADS, OPERATORS, SCHEMAS
from .library import LIBRARY

__all__ = ["LIBRARY", "MOST_HEADS", "OPERATORS", "SCHEMAS"]
