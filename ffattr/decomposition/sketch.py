"""The wide product made narrower, so that only norms are approximate: ``||o|| ~ ||o P||`` with ``P`` ``[d, q + r]``.

``P = [B | G] M^(1/2)``. ``B`` are the top ``q`` principal directions of a sample of output rows, each scaled to unit
norm; ``G`` are ``r`` random orthonormal directions of what ``B`` leaves, drawn half from all directions and half from
what the sample has there. Both measure a row, and ``M`` ``[q + r, q + r]`` is the quadratic form of these measurements
that tells the sample's norms best.

The usual ``P = [B | (I - B B^T) Gaussian]`` is unbiased, but most of its error is the noise of ``r`` random directions;
how much the other directions hold is better told from the rows that are known. On trained models the median error is a
quarter to a half smaller for it (``benchmarks/cpu/bench_sketch.py``).

Subspace iteration: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NonFiniteError

__all__ = ["Projection", "Sketch", "fit"]

_OVERSAMPLED = 8
_ROUNDS = 3  # of subspace iteration: spectra of rows fall slowly, and what is missed here G measures
_STEPS = 20  # of conjugate gradients; with the ridge below more change nothing
_RIDGE = 0.3  # in parts of a row's own weight in the least squares (1): the noise of quadratic forms in a small sample
_WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_SHARES = (0.5, 0.75)  # of principal directions among all: which is better depends on the layer


@dataclass(frozen=True)
class Sketch:
    """``method=ffattr.Sketch(...)``: approximate norms of all scopes from the feed-forward block on.

    ``components`` principal directions and ``projections`` random ones replace the ``d`` of the model; the wide product
    costs ``d / (components + projections)`` times less. ``seed``: the same one gives the same maps. ``tolerance``: the
    sketch of every layer and scope picks its own size, the smallest of a few whose expected median relative error is no
    more than this (then ``components`` and ``projections`` are not used), and is exact where none is.

    Raises TypeError or ValueError that names the offending value.

    >>> layer = torch.nn.TransformerEncoderLayer(128, 2, 256, batch_first=True).eval()
    >>> x = torch.randn(1, 130, 128, generator=torch.Generator().manual_seed(0))
    >>> attr = ffattr.attribute(layer, x, scopes="atb_ff", method=ffattr.Sketch(32, 32))  # 64 directions of 128
    >>> bool(0 < attr.sketch_error["atb_ff"] < 0.2)  # [layers, batch]
    True
    """

    components: int = 64
    projections: int = 64
    seed: int = 0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("components", 0), ("projections", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Sketch({name}={value!r}): expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"Sketch({name}={value}): expected {least} or more")
        if not self.width:
            raise ValueError("Sketch(components=0, projections=0): expected at least one direction in all")
        if self.seed >= 2**63:
            raise ValueError(f"Sketch(seed={self.seed}): expected less than 2**63")
        if self.tolerance is None:
            return
        if not isinstance(self.tolerance, float):
            raise TypeError(
                f"Sketch(tolerance={self.tolerance!r}): expected a float or None, got {type(self.tolerance).__name__}"
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(
                f"Sketch(tolerance={self.tolerance}): expected a relative error between 0 and 1, such as 0.02"
            )

    @property
    def width(self) -> int:
        """What ``components`` and ``projections`` come to."""
        return self.components + self.projections


@dataclass(frozen=True)
class Projection:
    """``matrix`` ``[d, q + r]``, the median relative ``error`` of norms after it, and the ``sketch`` that it is of.

    Exact where a sketch would be as wide as ``d``: ``matrix`` is then the identity and ``error`` is 0.
    """

    matrix: Tensor
    error: float
    sketch: Sketch

    @property
    def exact(self) -> bool:
        return self.matrix.shape[0] == self.matrix.shape[1]


def fit(rows: Tensor, sketch: Sketch, held: Tensor) -> Projection:
    """The projection that a layer's output ``rows`` ``[p, d]`` of some pairs of tokens suggest, judged by the rows
    ``held`` ``[p', d]`` of other pairs.

    The result is in the dtype of ``rows``, or float32 if that is a half type; rows of zeros do not count. Deterministic
    on one device. Raises ValueError for shapes that do not fit, `NonFiniteError` for NaN and infinity.
    """
    if rows.dim() != 2 or held.dim() != 2 or rows.shape[1] != held.shape[1]:
        raise ValueError(f"expected rows [p, d] and held [p', d], got {list(rows.shape)} and {list(held.shape)}")
    width, rows, held = rows.shape[1], _scale_to_unit(rows), _scale_to_unit(held)
    best: Projection | None = None
    for candidate in _candidate_sizes(sketch, width):
        matrix = _fit_matrix(rows, candidate)
        found = Projection(matrix, _median_error(held, matrix), candidate)
        if sketch.tolerance is None:
            return found
        if best is not None and best.error <= sketch.tolerance and best.sketch.width < candidate.width:
            return best
        best = found if best is None or found.error < best.error else best
    if best is not None and sketch.tolerance is not None and best.error <= sketch.tolerance:
        return best
    exact = replace(sketch, components=width, projections=0)
    return Projection(torch.eye(width, dtype=rows.dtype, device=rows.device), 0.0, exact)


def _candidate_sizes(sketch: Sketch, width: int) -> Iterator[Sketch]:
    """Sketches to try in turn, all of them narrower than ``width``."""
    if sketch.tolerance is None:
        if sketch.width < width:
            yield sketch
        return
    for total in _WIDTHS:
        for share in _SHARES:
            if total < width:
                components = round(total * share)
                yield replace(sketch, components=components, projections=total - components)


def _scale_to_unit(rows: Tensor) -> Tensor:
    """Rows of norm 1, without those of zeros."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise NonFiniteError(
            "the vectors of some pairs of tokens are NaN or infinite: a sketch cannot be fitted to them"
        )
    kept = largest > 0
    # Squares of very small or large numbers would not be numbers any more.
    rows = rows[kept] / largest[kept, None]
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _fit_matrix(rows: Tensor, sketch: Sketch) -> Tensor:
    """``[B | G] M^(1/2)`` ``[d, q + r]`` of rows of unit norm."""
    generator = torch.Generator(rows.device).manual_seed(sketch.seed)
    width, (q, r) = rows.shape[1], (sketch.components, sketch.projections)

    def random(columns: int) -> Tensor:
        return torch.randn(width, columns, generator=generator, dtype=rows.dtype, device=rows.device)

    basis = torch.linalg.qr(random(min(q + _OVERSAMPLED, width))).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    inside = rows @ basis
    principal = basis @ torch.linalg.eigh(inside.T @ inside).eigenvectors.flip(1)[:, :q]
    # Half of what the random directions are drawn from is the sample's: what its rows have more of is measured better.
    # The other half is for what it lacks.
    rest = rows - rows @ principal @ principal.T
    mixed = torch.randn(r, len(rows), generator=generator, dtype=rows.dtype, device=rows.device) @ rest
    left = mixed.T + random(r) * rest.norm().clamp_min(torch.finfo(rows.dtype).eps) / width**0.5
    for _ in range(2):  # once more for what rounding leaves
        left = torch.linalg.qr(left - principal @ (principal.T @ left)).Q
    directions = torch.cat([principal, left * ((width - q) / max(r, 1)) ** 0.5], 1)
    matrix: Tensor = directions @ _weigh_form(rows @ directions, q)
    return matrix


def _weigh_form(measured: Tensor, components: int) -> Tensor:
    """``M^(1/2)`` ``[k, k]`` such that ``measured @ M^(1/2)`` ``[p, k]`` has rows of norm about 1.

    Least squares for ``y M y = 1``: first with one weight for all principal directions and one for all random ones,
    then any symmetric ``M``, by conjugate gradients with a penalty on what it adds to the former. Only its positive
    part is a norm.
    """
    squares = torch.stack([part.square().sum(1) for part in measured.tensor_split((components,), 1)], 1).double()
    normal, target = squares.T @ squares, squares.sum(0)
    # The ridge, towards 1, is for a group without directions, and for a sample without rows.
    ridge = 1e-6 * torch.eye(2, dtype=torch.float64, device=measured.device) * (1 + normal.trace())
    two = torch.linalg.solve(normal + ridge, target + ridge.sum(1)).clamp_min(1e-3).sqrt().to(measured)
    sizes = torch.tensor([components, measured.shape[1] - components], device=measured.device)
    first = two.repeat_interleave(sizes)
    y = measured * first

    def gram(weights: Tensor) -> Tensor:
        out: Tensor = y.T @ (weights[:, None] * y)
        return out

    residual = gram(1 - y.square().sum(1))
    added, direction, size = torch.zeros_like(residual), residual, residual.square().sum()
    for _ in range(_STEPS):
        step = gram(((y @ direction) * y).sum(1)) + _RIDGE * direction
        along = size / (direction * step).sum().clamp_min(torch.finfo(size.dtype).tiny)
        added, residual = added + along * direction, residual - along * step
        before, size = size, residual.square().sum()
        direction = residual + direction * (size / before.clamp_min(torch.finfo(size.dtype).tiny))
    values, vectors = torch.linalg.eigh(torch.eye(len(added), dtype=y.dtype, device=y.device) + (added + added.T) / 2)
    root: Tensor = first[:, None] * vectors * values.clamp_min(0).sqrt()
    return root


def _median_error(held: Tensor, matrix: Tensor) -> float:
    """Median relative error of the norms of rows of unit norm; 0 without any."""
    if not len(held):
        return 0.0
    return float(((held @ matrix).norm(dim=1) - 1).abs().median())
