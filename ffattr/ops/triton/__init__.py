"""The ``triton`` backend: the operators of `ffattr.ops` as Triton kernels.

In come the operators' arguments, out comes what the contract says; importing this imports triton, which
`ffattr.ops.backends` does when the backend is first wanted.

Read
    arguments.py        checks of arguments; blocks.py: blocks of queries within one sequence
    configs.py          tile sizes, measured or by rule
    ff_norms.py         feed-forward maps by pairs; operator_norms.py: by a matrix for each query
    tiles.py            tiles of matrices and their products; epilogue.py: from rows to norms
    gram_norms.py       attention-level maps
    ig_slope.py         slopes; activations.py and gates.py: the functions that they are made of
    runtime.py          whether kernels are interpreted, and on which device they run
"""

from .ff_norms import ff_norms
from .gram_norms import gram_norms
from .ig_slope import ig_slope
from .operator_norms import operator_norms

__all__ = ["ff_norms", "gram_norms", "ig_slope", "operator_norms"]
