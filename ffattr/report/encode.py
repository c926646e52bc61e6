"""Maps as text that a page can hold: quantised on a logarithmic scale, compressed, in base64.

Shapes: ``n`` rows and ``m`` columns of a map.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
from torch import Tensor

from ..errors import NonFiniteError

__all__ = ["GRIDS", "Coded", "Grid", "Sample", "array_of", "encode_map"]

_ROWS_AT_ONCE = 2**20  # entries that are worked on together
_JUDGED = 2**18  # entries from which the better of two ways to compress is told
_BYTE = 256


@dataclass(frozen=True)
class Grid:
    """Says how exactly values are kept: each within a factor of ``1 + accuracy``, or, below ``floor`` times the largest
    of its map, as that.

        >>> from ffattr.report.encode import Grid
        >>> Grid(0.01, 1e-9).count_levels(top=1.0, least=0.5)
        36
    """

    accuracy: float
    floor: float

    @property
    def step(self) -> float:
        """The distance between the logarithms of two neighbouring levels."""
        return 2 * math.log1p(self.accuracy)

    def count_levels(self, top: float, least: float) -> int:
        """Counts the levels that there are, with values from ``least`` to ``top``. Exact zeros are one more."""
        if top == 0:
            return 1
        return 1 + round(math.log(top / max(least, top * self.floor)) / self.step)


GRIDS = (
    *(Grid(accuracy, 1e-9) for accuracy in (0.0002, 0.001, 0.003, 0.01, 0.02)),
    *(Grid(accuracy, 1e-6) for accuracy in (0.03, 0.04, 0.05, 0.07)),
    *(Grid(accuracy, 1e-4) for accuracy in (0.1, 0.15, 0.2)),
    *(Grid(accuracy, 1e-3) for accuracy in (0.3, 0.5)),
)
"""Grids from the finest to one with ten levels. The finest has 51 800 of them, so that 16 bits always hold a code."""


@dataclass(frozen=True)
class Coded:
    """Holds a map ``[n, m]`` as text: in base64, the sums of its rows (float32), then the compressed codes.

    Code 0 is an exact zero, code ``c`` the value ``top * exp(step * (c - levels))``. Each row of codes but the first is
    kept as its difference, modulo ``levels + 1``, to the one ``above`` it, where that compresses better. Beyond 256
    codes, the low bytes of all come first and the high bytes in a text of their own. Where entries are ``signed``,
    codes are of their sizes, and last come bits, row after row, that are set where an entry is negative.
    """

    top: float
    levels: int
    above: bool
    text: str
    signed: bool = False


def array_of(tensor: Tensor, name: str, signed: bool = False) -> numpy.ndarray:
    """Returns the values of a map in float64, or in float32 where they have no more; ``name`` calls it in errors.

    Raises ValueError where one is negative, but not if ``signed``, `NonFiniteError` where one is NaN or infinite.
    """
    values = tensor.detach().cpu()
    array: numpy.ndarray = (values if values.element_size() == 8 else values.float()).numpy()
    if array.size and not numpy.isfinite(array).all():
        raise NonFiniteError(f"{name} holds NaN or infinity: a page can show neither")
    if array.size and not signed and float(array.min()) < 0:
        raise ValueError(f"{name} holds {float(array.min()):.3g}, expected norms: zero or more")
    return array


@dataclass(frozen=True)
class Sample:
    """Holds some rows of a map, from which `estimate_size` tells about how many bytes of text all of it takes."""

    bands: list[numpy.ndarray]
    top: float
    least: float
    rows: int
    sign_bits: int = 0

    @classmethod
    def from_map(cls, values: numpy.ndarray, entries: float) -> Sample:
        """Takes four bands of the rows of a map ``[n, m]``, ``entries`` in all or a little more."""
        rows, columns = values.shape
        height = math.ceil(entries / 4 / columns)
        starts = [0] if rows <= 4 * height else [round((rows - height) * place) for place in (0.1, 0.4, 0.7, 1.0)]
        bands = [values] if len(starts) == 1 else [values[start : start + height].copy() for start in starts]
        if not bool((values < 0).any()):
            return cls(bands, *_find_extremes(values), rows)
        sizes = numpy.abs(values)
        return cls([numpy.abs(band) for band in bands], *_find_extremes(sizes), rows, values.size)

    def estimate_size(self, grid: Grid) -> float:
        levels = grid.count_levels(self.top, self.least)
        codes = [_quantise_rows(band, grid, self.top, levels) for band in self.bands]
        packed = sum(len(plane) for some in codes for plane in _compress_codes(some, levels)[1])
        return (packed * self.rows / sum(map(len, codes)) + 4 * self.rows + self.sign_bits / 8) * 4 / 3


def encode_map(values: numpy.ndarray, grid: Grid) -> Coded:
    """Encodes a map ``[n, m]`` on a grid."""
    sums = values.sum(1, dtype=numpy.float64).astype("<f4").tobytes()
    negative = values < 0
    signed = bool(negative.any())
    values = numpy.abs(values) if signed else values
    top, least = _find_extremes(values)
    levels = grid.count_levels(top, least)
    codes = numpy.concatenate([_quantise_rows(rows, grid, top, levels) for rows in _split_rows(values)])
    above, packed = _compress_codes(codes, levels)
    if signed:
        packed.append(zlib.compress(numpy.packbits(negative).tobytes(), 6))
    return Coded(top, levels, above, ".".join(base64.b64encode(part).decode() for part in (sums, *packed)), signed)


def _find_extremes(values: numpy.ndarray) -> tuple[float, float]:
    """Returns the largest entry and the smallest that is not zero (0 where all are)."""
    least = min((float(rows[rows > 0].min(initial=numpy.inf)) for rows in _split_rows(values)), default=math.inf)
    return (float(values.max()), least) if math.isfinite(least) else (0.0, 0.0)


def _split_rows(values: numpy.ndarray) -> Iterator[numpy.ndarray]:
    step = max(1, _ROWS_AT_ONCE // values.shape[1])
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _quantise_rows(values: numpy.ndarray, grid: Grid, top: float, levels: int) -> numpy.ndarray:
    if top == 0:
        return numpy.zeros(values.shape, numpy.uint16)
    with numpy.errstate(divide="ignore"):
        below = numpy.log(values / values.dtype.type(top)) / -grid.step
    near = numpy.rint(numpy.minimum(below, levels - 1, out=below), out=below)  # -log 0 is the farthest of all
    return numpy.where(values > 0, levels - near, 0).astype(numpy.uint16)


def _compress_codes(codes: numpy.ndarray, levels: int) -> tuple[bool, list[bytes]]:
    """Returns whether differences to the row above are shorter, judged by some rows, and the compressed planes."""
    rows = max(2, _JUDGED // codes.shape[1])
    some = codes[len(codes) // 2 :][:rows] if len(codes) > rows else codes
    plain, differences = (sum(map(len, _compress_planes(some, levels, above))) for above in (False, True))
    above = differences < plain
    return above, _compress_planes(codes, levels, above)


def _compress_planes(codes: numpy.ndarray, levels: int, above: bool) -> list[bytes]:
    if above:
        differences = codes.astype(numpy.int32)
        differences[1:] -= codes[:-1]
        codes = (differences % (levels + 1)).astype(numpy.uint16)
    planes = [codes & 255, codes >> 8] if levels + 1 > _BYTE else [codes]
    # Differences look like noise to the search for repetitions: beyond level 6 it takes long and finds nothing.
    return [zlib.compress(plane.astype(numpy.uint8).tobytes(), 6) for plane in planes]
