"""The ``triton`` backend: the operators of `ffattr.ops` as Triton kernels.

Importing this imports triton; `ffattr.ops.backends` does so when the backend is first wanted.
"""

from .ff_norms import ff_norms
from .gram_norms import gram_norms
from .ig_slope import ig_slope
from .operator_norms import operator_norms

__all__ = ["ff_norms", "gram_norms", "ig_slope", "operator_norms"]
