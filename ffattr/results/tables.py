"""Maps as tables: tidy pandas frames, and xarray.

Shapes: ``L`` layers, ``N`` tokens on an axis, ``n`` and ``m`` tokens or blocks of tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis.rows import key_mask
from ..errors import names_missing_extra
from .contents import Contents, Ticks, drop_padding, label_axes, mark_own_tokens, name_columns, read_map
from .scope_names import extra_axis

if TYPE_CHECKING:
    import pandas

__all__ = ["make_dataset", "make_frame", "rank_pairs"]


@names_missing_extra
def make_frame(contents: Contents, scopes: Sequence[str]) -> pandas.DataFrame:
    """Does `Attribution.to_pandas`."""
    import pandas as pd

    frames = [_make_sequence_frame(contents, scope, batch) for scope in scopes for batch in range(len(contents.mask))]
    found = pd.concat(frames, ignore_index=True)
    for column in ("scope", "query_token", "key_token"):
        found[column] = found[column].astype("category")
    for column in ("head", "expert"):
        if column in found:
            found[column] = found[column].astype("Int64")
    return found


@names_missing_extra
def rank_pairs(contents: Contents, k: int, scope: str, own_too: bool) -> pandas.DataFrame:
    """Does `Attribution.top`."""
    import pandas as pd

    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"top(k={k!r}), expected an integer of at least 1")
    frames = []
    for batch in range(len(contents.mask)):
        rows, keys = label_axes(contents, batch)
        itself = None if own_too else mark_own_tokens(contents, batch, rows, keys)
        for place, layer in enumerate(contents.layers):
            values = drop_padding(read_map(contents, scope, place, batch).cpu(), rows, keys).double()
            total = contents.kept.read_totals(scope, place, batch)[..., rows.indices]
            norms = values if itself is None else values.masked_fill(itself, 0)
            found = norms.flatten().topk(min(k, norms.numel()))
            at = found.indices[found.values > 0]  # of few tokens there are no more pairs
            *before, row, column = torch.unravel_index(at, values.shape)
            columns = {
                "layer": layer,
                "batch": batch,
                "rank": range(1, len(at) + 1),
                "query": rows.positions[row],
                "key": keys.positions[column],
                "query_token": [rows.labels[n] for n in row.tolist()],
                "key_token": [keys.labels[n] for n in column.tolist()],
                "norm": values.flatten()[at],
                "share": (values / total[..., None].clamp_min(torch.finfo(total.dtype).tiny)).flatten()[at],
            }
            if extra_axis(scope) == "head":
                columns["head"] = before[0]
            elif extra_axis(scope) == "expert":
                assert contents.experts is not None
                columns["expert"] = contents.experts[place, batch].cpu()[rows.indices[row], before[0]]
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


@names_missing_extra
def make_dataset(contents: Contents, scopes: Sequence[str]) -> Any:
    """Does `Attribution.to_xarray`."""
    import xarray

    block = contents.block or 1
    queries = list(contents.queries)
    coordinates: dict[str, Any] = {
        "layer": list(contents.layers),
        "query": queries[::block],
        "key": list(range(0, key_mask(contents).shape[1], block)),
        "query_real": (("batch", "query"), contents.mask.cpu()[:, queries[::block]].numpy()),
        "key_real": (("batch", "key"), key_mask(contents).cpu()[:, ::block].numpy()),
    }
    if contents.names:
        names = [[row[query] for query in queries[::block]] for row in contents.names]
        coordinates["query_token"] = (("batch", "query"), names)
    if name_columns(contents):
        coordinates["key_token"] = (("batch", "key"), [row[::block] for row in name_columns(contents)])
    variables = {}
    for scope in scopes:
        values = contents[scope].detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        by = extra_axis(scope)
        variables[scope] = (("layer", "batch", *([by] if by else []), "query", "key"), values.numpy())
        if block == 1:
            variables[f"{scope}_bias"] = (("layer", "batch", "query"), contents.bias[scope].detach().cpu().numpy())
    if contents.experts is not None and block == 1:
        variables["experts"] = (("layer", "batch", "query", "expert"), contents.experts.cpu().numpy())
    kept = {key: value for key, value in contents.arguments.items() if isinstance(value, (str, int, float))}
    return xarray.Dataset(
        variables, coordinates, {key: int(v) if isinstance(v, bool) else v for key, v in kept.items()}
    )


def _make_sequence_frame(contents: Contents, scope: str, batch: int) -> pandas.DataFrame:
    """Makes the rows of `make_frame` of one scope and sequence."""
    rows, keys = label_axes(contents, batch)
    values, key = contents.kept.read_entries(scope, batch, rows.indices, keys.indices, keys.positions)
    by = None
    if extra_axis(scope) == "expert":
        assert contents.experts is not None
        numbers = contents.experts[:, batch].cpu()[:, rows.indices].transpose(1, 2)[..., None]  # [L, k, N', 1]
        by = "expert", numbers
    elif extra_axis(scope) == "head":
        by = "head", torch.arange(values.shape[1])[:, None, None]
    found = _tabulate_entries(values, key, contents.layers, rows, keys, by)
    found.insert(0, "scope", scope)
    found.insert(2, "batch", batch)
    return found


def _tabulate_entries(
    values: Tensor, key: Tensor, layers: Sequence[int], rows: Ticks, keys: Ticks, apart: tuple[str, Tensor] | None
) -> pandas.DataFrame:
    """Makes one row per entry of ``values`` ``[L, n, m]``, per-head or per-expert ``[L, k, n, m]``.

    ``key`` is the key position of every entry or column (-1: there is none, and no row), ``apart`` the name of the
    axis of ``k`` and its numbers; both broadcast to ``values``.
    """
    import numpy as np
    import pandas as pd

    kept = key.expand(values.shape) >= 0

    def select_entries(numbers: Tensor) -> Any:
        return numbers.expand(values.shape)[kept].numpy()

    layer = torch.tensor(list(layers)).view(-1, *(1,) * (values.dim() - 1))
    row = select_entries(torch.arange(len(rows.labels))[:, None])
    of_key = select_entries(key)
    query_names = np.array([*rows.labels, ""], dtype=object)[:-1]  # with "" also none at all are objects
    key_names = np.full(int(keys.positions.max()) + 1 if len(keys.labels) else 0, "", dtype=object)
    key_names[keys.positions.numpy()] = keys.labels
    columns = {
        "layer": select_entries(layer),
        "query": rows.positions.numpy()[row],
        "key": of_key,
        "query_token": query_names[row],
        "key_token": key_names[of_key],
        "norm": select_entries(values.to(torch.promote_types(values.dtype, torch.float32))),
    }
    if apart is not None:
        columns[apart[0]] = select_entries(apart[1])
    return pd.DataFrame(columns)
