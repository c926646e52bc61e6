"""Contributions as tables: one row for each token and boundary, and the strongest tokens.

Shapes: ``K`` numbers, ``M`` boundaries, ``n`` real tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import names_missing_extra
from .contents import SignedContents, label_tokens, list_texts, name_own

if TYPE_CHECKING:
    import pandas

__all__ = ["BIAS", "make_frame", "rank_tokens"]

BIAS = "(bias)"
"""What stands for the token where a score comes from none."""


@names_missing_extra
def make_frame(contents: SignedContents) -> pandas.DataFrame:
    """Does `Contributions.to_pandas`."""
    import pandas as pd

    found = pd.concat(list(_list_frames(contents)), ignore_index=True)
    found["layer"] = found["layer"].astype("Int64")
    for column in ("stack", "name", "token"):
        if column in found:
            found[column] = found[column].astype("category")
    return found


def _list_frames(contents: SignedContents) -> Iterator[pandas.DataFrame]:
    stacked = contents.cross_scores is not None
    for batch in range(len(contents.mask)):
        own = (contents.scores, contents.bias, contents.mask, contents.names)
        yield _tabulate(contents, batch, name_own(contents), contents.layers, *own)
        if contents.cross_scores is not None and contents.cross_mask is not None:
            across = (contents.cross_scores, None, contents.cross_mask, contents.cross_tokens or [])
            yield _tabulate(contents, batch, "cross", contents.layers, *across)
        if stacked and contents.encoder is not None:
            within = contents.encoder
            its = (within.scores, within.bias, within.mask, within.names)
            yield _tabulate(contents, batch, "encoder", within.layers, *its)


def _tabulate(
    contents: SignedContents,
    batch: int,
    stack: str,
    layers: tuple[int, ...],
    scores: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    tokens: list[list[str]],
) -> pandas.DataFrame:
    """Makes the rows of one sequence of one stack of layers: a row for each token, then, where it has one, the bias."""
    import numpy as np
    import pandas as pd

    ticks = label_tokens(mask[batch], tokens[batch] if tokens else [])
    values = _widen(scores[:, :, batch])[..., ticks.indices]  # [K, M, n]
    positions, labels = ticks.positions.tolist(), [*ticks.labels]
    if bias is not None:
        values = torch.cat([values, _widen(bias[:, :, batch])[..., None]], -1)
        positions.append(-1)
        labels.append(BIAS)
    count, boundaries, width = values.shape
    target, boundary, place = (
        one.flatten().numpy() for one in torch.meshgrid(*map(torch.arange, values.shape), indexing="ij")
    )
    numbers: list[int | None] = [*layers, None]
    columns: dict[str, Any] = {
        "target": target,
        "name": np.array([names[batch] for names in contents.targets], dtype=object)[target],
        "read_at": contents.positions[:, batch].cpu().numpy()[target],
        "batch": batch,
        "boundary": boundary,
        "layer": pd.array(numbers, dtype="Int64")[boundary],
        "position": np.array(positions, dtype=np.int64)[place],
        "token": np.array([*labels, ""], dtype=object)[place],
        "score": values.flatten().numpy(),
    }
    assert (count, boundaries, width) == (len(contents.targets), len(layers) + 1, len(positions))
    frame = pd.DataFrame(columns)
    if stack:
        frame.insert(3, "stack", stack)
    return frame


def _widen(values: Tensor) -> Tensor:
    return values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32))


@names_missing_extra
def rank_tokens(contents: SignedContents, k: int, place: int) -> pandas.DataFrame:
    """Does `Contributions.top`; ``place`` is that of the boundary."""
    import pandas as pd

    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"top(k={k!r}), expected an integer of at least 1")
    texts, frames = list_texts(contents, place), []
    for target in range(len(contents.targets)):
        for batch in range(len(contents.mask)):
            ticks = [text.label_tokens(batch) for text in texts]
            scores = torch.cat([text.read_scores(target, batch) for text in texts])
            order = scores.abs().sort(descending=True, stable=True).indices
            order = order[scores[order] != 0][:k]
            stacks = [text.stack for text, of in zip(texts, ticks, strict=True) for _ in of.labels]
            labels = [label for of in ticks for label in of.labels]
            columns: dict[str, Any] = {
                "target": target,
                "name": contents.targets[target][batch],
                "batch": batch,
                "rank": range(1, len(order) + 1),
                "position": torch.cat([of.positions for of in ticks])[order].numpy(),
                "token": [labels[at] for at in order.tolist()],
                "score": scores[order].numpy(),
            }
            if len(texts) > 1:
                columns["stack"] = [stacks[at] for at in order.tolist()]
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
