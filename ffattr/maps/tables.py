"""The axes of a map without padding, and the map as a table.

Shapes: ``L`` layers, ``N`` tokens on an axis, ``n`` and ``m`` tokens or blocks of tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas

__all__ = ["Ticks", "table"]


@dataclass(frozen=True)
class Ticks:
    """The rows or the columns of a map that are not padding: their ``places`` ``[n]`` on its axis, the ``positions``
    ``[n]`` of their tokens (of a block of tokens, of its first), and how they are called."""

    places: Tensor
    positions: Tensor
    labels: list[str]

    @classmethod
    def of(cls, positions: Tensor, real: Tensor, tokens: Sequence[str], block: int | None) -> Ticks:
        """``positions`` ``[N]`` are those of an axis, ``real`` ``[N]`` False where they are padding, ``tokens`` the
        texts of all positions (none: their numbers). ``block`` tokens side by side are one row or column."""
        places = real.nonzero().flatten()
        names = [tokens[position] if tokens else str(position) for position in positions[places].tolist()]
        if block is None:
            return cls(places, positions[places], names)
        blocks, counts = (places // block).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        spans = zip((ends - counts).tolist(), (ends - 1).tolist(), strict=True)
        labels = [names[first] if first == last else f"{names[first]} … {names[last]}" for first, last in spans]
        return cls(blocks, positions[places][ends - counts], labels)


def table(
    values: Tensor, key: Tensor, layers: Sequence[int], rows: Ticks, keys: Ticks, apart: tuple[str, Tensor] | None
) -> pandas.DataFrame:
    """One row per entry of ``values`` ``[L, n, m]``, told apart by head or expert ``[L, k, n, m]``.

    ``key`` is the key position of every entry or column (-1: there is none, and no row), ``apart`` the name of the
    axis of ``k`` and its numbers; both broadcast to ``values``.
    """
    import numpy as np
    import pandas as pd

    kept = key.expand(values.shape) >= 0

    def column(numbers: Tensor) -> Any:
        return numbers.expand(values.shape)[kept].numpy()

    layer = torch.tensor(list(layers)).view(-1, *(1,) * (values.dim() - 1))
    row = column(torch.arange(len(rows.labels))[:, None])
    of_key = column(key)
    query_names = np.array([*rows.labels, ""], dtype=object)[:-1]  # with "" also none at all are objects
    key_names = np.full(int(keys.positions.max()) + 1 if len(keys.labels) else 0, "", dtype=object)
    key_names[keys.positions.numpy()] = keys.labels
    columns = {
        "layer": column(layer),
        "query": rows.positions.numpy()[row],
        "key": of_key,
        "query_token": query_names[row],
        "key_token": key_names[of_key],
        "norm": column(values.to(torch.promote_types(values.dtype, torch.float32))),
    }
    if apart is not None:
        columns[apart[0]] = column(apart[1])
    return pd.DataFrame(columns)
