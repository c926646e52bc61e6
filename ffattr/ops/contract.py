"""The contract of the four operators, in one place: ``torch.ops.ffattr.*`` and what every backend must compute.

The schemas are in ``schemas.inc``; the compiled library declares them, and where it is not there they are declared
here. Each gets a fake (so that ``torch.compile`` can trace it) and the plain PyTorch version of
`ffattr.ops.torch_kernels` as the default for every device. The library or a Triton kernel that is present takes over
per device; without one the same call still runs. ``torch.ops.ffattr_cuda.*`` are the same operators by the compiled
CUDA kernels alone: for CUDA tensors ``torch.ops.ffattr.*`` is a Python function that picks (`ffattr.ops.backends`), and
what is picked has to have a name of its own. ``operator_norms`` has no CUDA kernel: there its PyTorch version runs,
which leaves the products to cuBLAS.

Shapes: ``N`` query tokens, ``M`` key tokens (a block of one sequence), ``H`` heads, ``F`` feed-forward width, ``d``
model width, ``S`` streams of the feed-forward block: 1 if dense, 2 if gated (gate first, up second).

Three arguments are shared by all maps:

``alpha`` ``[H, N, M]``
    attention weights. A pair whose weights are all zero, and which is not a token with itself, gives an exact zero
    and costs nothing: causal masks and windows need no flag.
``position`` ``[N]`` int64
    the key index, within this block, of the query token itself; outside ``0..M-1`` when it is not in this block.
    The residual is "one more head", number ``H``, whose weight is 1 where ``position[n] == m`` and 0 elsewhere.
``sequences`` ``[B + 1, 2]`` int64 on the CPU, or None
    several sequences of different length in one call, without padding work. Row ``b`` is (first query, first key) of
    sequence ``b``: (0, 0) in the first row, (``N``, number of keys ``K``) in the last. Queries ``sequences[b, 0]`` up
    to ``sequences[b + 1, 0]`` meet only keys ``sequences[b, 1]`` up to ``sequences[b + 1, 1]``, which are columns 0, 1,
    ... of their rows of ``alpha``; ``position`` counts these columns. ``M`` is at least the longest sequence's number
    of keys. Columns beyond a sequence's keys are padding: ``alpha`` is not read there and the result is exactly 0.
    What has a row for each key (``features``, ``values``, ``residual``, ``gram``) then has ``K`` of them instead of
    ``M``, one sequence after the other. None is one sequence, with ``K = M``.

And all wide maps end alike. With ``o`` the feed-forward row of a pair and
``r = residual_scale[n] * (sum_h alpha[h, n, m] residual[m, h] + [position[n] == m] residual[m, H])`` they return
``[2, N, M]``: ``||o||`` and ``||o + r||``, or, where ``norm_scale`` is given, ``[3, N, M]`` with
``norm_scale[n] * ||gamma * centre(o + r)||`` as the third. ``residual_scale`` is a norm's ``1 / s_n``, never zero.
``reduction`` says what stands in the place of each norm: ``"l2"`` that, ``"l1"`` the sum of magnitudes, ``"alti"``
``max(0, ||y||_1 - ||y - v||_1)`` of the vector ``v`` and of ``y = totals[scope, n]``, ``totals`` ``[2 or 3, N, d]``
(`ffattr.ops.reduction`; a row is not divided by its sum). Where there are no neurons, ``F = 0``, ``o`` is
zero: so vectors before the feed-forward block are reduced by ``ff_norms`` as well.
``triangular`` says that ``down`` is zero right of its diagonal (``down[i, j] = 0`` where ``j > i``), so that kernels
may leave out these products, a share ``d / 2F`` of all (`ffattr.engine.planning.rotation`); those that do not give the
same.
Operators are functional and have no gradient. A neuron whose slopes are exactly zero counts as nothing, whatever its
features or row of ``down``: kernels may skip it.

Dtypes: ``alpha``, ``residual_scale``, ``gamma``, ``norm_scale``, ``totals``, ``down_scale`` and the ``row_scale`` of
``gram_norms`` share one, float32 or float64, which the result takes. The wide operands (``features``, ``slope``,
``down``, ``residual``, ``values``, ``maps``, ``own``) share one too: that same, or bfloat16 or float16. Then the wide
products are in the narrow dtype and the norms in ``alpha``'s, and a pair's weights are divided by their largest
magnitude before they are rounded, so that tiny ones keep their digits. With ``down_scale``, ``down`` is float8_e4m3fn
and the other wide operands are bfloat16. The C++ kernels take float32, float64, and bfloat16 beside float32, and refuse
the rest; also ``down`` alone in bfloat16 beside float32 operands, which is what the engine gives them: what is
multiplied by it is then rounded once, as it is made.

Two tokens, one head, vectors of norm 2 and 3 (so grams 4 and 9); the second token attends to both equally:

>>> alpha = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])  # [H, N, M]
>>> gram = torch.tensor([[[4.0]], [[9.0]]], dtype=torch.float64)  # [M, H, H]
>>> torch.ops.ffattr.gram_norms(alpha, torch.tensor([0, 1]), gram, None)
tensor([[2.0000, 0.0000],
        [1.0000, 1.5000]])
>>> z = torch.tensor([[[-2.0, 0.0, 3.0]]])  # [S, N, F]
>>> torch.ops.ffattr.ig_slope(z, None, None, "gelu", "exact", 0)  # gelu(z) / z, and its limit at 0
tensor([[[0.0228, 0.5000, 0.9987]]])
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import torch_kernels
from .library import LIBRARY, binary
from .reduction import Reduction

__all__ = ["MOST_HEADS", "OPERATORS", "SCHEMAS", "Epilogue", "Operators"]

MOST_HEADS = 128
"""The kernels for GPUs are written for up to this many: a tile holds the weights of all heads, and a wider one would
leave no registers for the product."""

_TEXTS = re.findall(r'R"\((\w+)(.*?)\)"', Path(__file__).with_name("schemas.inc").read_text("utf-8"), flags=re.DOTALL)
SCHEMAS = {name: " ".join(schema.split()) for name, schema in _TEXTS}
"""What follows the name of each operator, from ``schemas.inc``, which the library is compiled with."""

OPERATORS = tuple(SCHEMAS)


class Epilogue(NamedTuple):
    """The last operands of both wide operators: what is added to each vector, the norm that follows, what a vector is
    reduced to, and whether ``down`` is zero right of its diagonal."""

    residual: Tensor
    residual_scale: Tensor | None = None
    gamma: Tensor | None = None
    norm_scale: Tensor | None = None
    centre: bool = False
    sequences: Tensor | None = None
    reduction: Reduction = "l2"
    totals: Tensor | None = None
    triangular: bool = False


class Operators(Protocol):
    """Has the four operators, as a backend implements them; `SCHEMAS` says what they compute, and gives the shapes."""

    def __hash__(self) -> int: ...  # what was found out about them is remembered

    def ig_slope(
        self, z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str, rule: str, steps: int
    ) -> Tensor: ...

    def gram_norms(
        self, alpha: Tensor, position: Tensor, gram: Tensor, row_scale: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor: ...

    def ff_norms(
        self,
        alpha: Tensor,
        position: Tensor,
        features: Tensor,
        slope: Tensor,
        down: Tensor,
        down_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        gamma: Tensor | None,
        norm_scale: Tensor | None,
        centre: bool,
        sequences: Tensor | None = None,
        reduction: Reduction = "l2",
        totals: Tensor | None = None,
        triangular: bool = False,
    ) -> Tensor: ...

    def operator_norms(
        self,
        alpha: Tensor,
        position: Tensor,
        values: Tensor,
        maps: Tensor,
        own: Tensor,
        slope: Tensor,
        down: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        gamma: Tensor | None,
        norm_scale: Tensor | None,
        centre: bool,
        sequences: Tensor | None = None,
        reduction: Reduction = "l2",
        totals: Tensor | None = None,
        triangular: bool = False,
    ) -> Tensor: ...


def _fake_slope(z: Tensor, *_: object) -> Tensor:
    return torch.empty_like(z)


def _fake_gram(alpha: Tensor, *_: object) -> Tensor:
    return alpha.new_empty(alpha.shape[1:])


def _fake_wide(operator: str) -> Callable[..., Tensor]:
    # Counted from the front: the dispatcher leaves out trailing arguments that have their default.
    at = list(inspect.signature(getattr(torch_kernels, operator)).parameters).index("norm_scale")

    def fake_norms(*arguments: Tensor) -> Tensor:
        alpha, scopes = arguments[0], 2 if arguments[at] is None else 3
        return alpha.new_empty((scopes, *alpha.shape[1:]))

    return fake_norms


_FAKES = {
    "ig_slope": _fake_slope,
    "gram_norms": _fake_gram,
    "ff_norms": _fake_wide("ff_norms"),
    "operator_norms": _fake_wide("operator_norms"),
}


def _require_plain(operator: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes plain PyTorch, where tensors of all kinds arrive that no kernel is for, refuse what it cannot compute."""

    @functools.wraps(kernel)
    def compute(*arguments: Any, **named: Any) -> Tensor:
        for argument in (*arguments, *named.values()):
            if isinstance(argument, Tensor) and (argument.layout != torch.strided or argument.is_quantized):
                kind = "quantized" if argument.is_quantized else str(argument.layout).removeprefix("torch.")
                raise ValueError(f"{operator}: a tensor {list(argument.shape)} is {kind}, expected dense ones")
        return kernel(*arguments, **named)

    return compute


def _check_declared(operator: str) -> None:
    """Raises ImportError where the library declares ``operator`` otherwise: it is of another version."""
    namespace, _, name = operator.partition("::")
    declared = getattr(getattr(torch.ops, namespace), name).default._schema
    if declared != torch._C.parse_schema(operator + SCHEMAS[name]):
        raise ImportError(
            f"{LIBRARY} is of another version of ffattr: it declares {declared}, expected {operator}{SCHEMAS[name]}; "
            "build it again: python setup.py build_ext --inplace"
        )


def _complete_operators(namespace: str) -> torch.library.Library:
    """Gives every operator its fake and the plain PyTorch version, and declares it where no library has."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if binary.missing:
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        else:
            _check_declared(f"{namespace}::{name}")
        library.impl(name, _require_plain(name, getattr(torch_kernels, name)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


_libraries = [
    _complete_operators(namespace) for namespace in ("ffattr", "ffattr_cuda")
]  # registered for as long as they live
