"""Why the parts of the feed-forward block undo each other's effects on the maps (a question of Kobayashi et al. 2024,
arXiv 2302.00456; the measures are ours): which dimensions the effects lie in, and what the residual connection
bypasses.

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens, ``d`` model width, ``K`` numbers of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import names_missing_extra
from ..change import BOUNDS, average_defined, bound_mean, measure_change
from ..rows import Decomposed, find_components, find_ff_output, join_residual, mark_real_pairs, read_summed_values

if TYPE_CHECKING:
    import pandas

__all__ = ["REMOVED", "cancellation", "ff_energy", "norm_balance"]

REMOVED = (0, 1, 2, 4, 8, 16)
_Scopes = Mapping[str, Decomposed] | Sequence[Decomposed]
_AT_ONCE = 2**22  # numbers of a block of vectors in their new order


@names_missing_extra
def cancellation(
    vectors: _Scopes,
    removed: Sequence[int] = REMOVED,
    *,
    order: str = "ff",
    scores: Tensor | None = None,
    seed: int = 0,
    causal: bool | None = None,
) -> pandas.DataFrame:
    """Repeats `contextualization_change` with some dimensions of the model left out of every norm.

    Of ``k`` dimensions ``D`` removed, the map of a scope is ``sqrt(sum of F_i(x_j)[c] ** 2, c not in D)``, and the
    value ``1 - Spearman rho`` of two such maps, as in `contextualization_change`, which ``k = 0`` is equal to. Where
    the feed-forward network rearranges the map through a few dimensions that the norm after it scales down again, both
    changes shrink when these are removed, and not when as many others are.

    One row per layer, component and number: ``layer``, ``component`` (``FF``, ``RES``, ``LN``, ``FF block``),
    ``before``, ``after`` (scopes), ``order``, ``removed``, ``value``, the mean over the sequences, and its bounds
    ``low`` and ``high``, as of `contextualization_change`.

    vectors: of scopes that follow each other, of the same inputs, layers and queries, as `ffattr.vectors` returns them
        for a list of scopes; of a large model, one layer after the other (``layers=3``), with ``pandas.concat`` for
        the frames.
    removed: how many dimensions, each below ``d``.
    order: which ones go first. ``"ff"``: those with the largest `ff_energy` in these vectors; ``"random"``, drawn with
        ``seed`` for each layer: the control. Any other name comes with ``scores``.
    scores: ``[L, d]``, or ``[d]`` for all layers: dimensions with the largest go first. For instance the norm's gain,
        smallest first, is ``order="gamma", scores=-gamma.abs()``; `ff_energy` of a whole corpus keeps to the same
        dimensions in each of its parts.
    causal: whether only keys that are not after the query count. None: where no vector comes from such a key.

    Work is done once for all of ``removed``, in blocks of queries. Raises ValueError for vectors that do not belong
    together, scopes without a component, scores of another shape, and numbers out of range.

    >>> scopes = ["atb", "atb_ff", "atb_ff_res"]
    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope=scopes, layers=0)
    >>> frame = ffattr.analysis.cancellation(vectors, removed=[0, 4])
    >>> frame[["component", "removed"]].values.tolist()
    [['FF', 0], ['FF', 4], ['RES', 0], ['RES', 4]]
    """
    import pandas as pd

    by_scope = _group_by_scope(vectors)
    found = find_components(list(by_scope))
    needed = list(dict.fromkeys(scope for _, *both in found for scope in both))
    one = by_scope[needed[0]]
    width = one.values.shape[-1]
    cuts = _sort_cuts(removed, width)
    wanted = [cuts.index(k) for k in removed]
    orders = _order_dimensions(by_scope, order, scores, seed)
    if causal is None:
        causal = not _looks_ahead(one)
    counted = mark_real_pairs(one.mask, one.mask, one.queries, causal)
    rows = []
    for place, layer in enumerate(one.layers):
        changes: dict[tuple[str, str, str], list[list[float]]] = {step: [] for step in found}
        for batch, some in enumerate(counted):
            maps = {s: _sum_remaining_squares(by_scope[s].values[place, batch], orders[place], cuts) for s in needed}
            for step in found:
                before, after = maps[step[1]], maps[step[2]]
                at = some.to(before.device)
                changes[step].append([measure_change(before[k][at], after[k][at]) for k in wanted])
        for step, values in changes.items():
            for number, of_sequences in zip(removed, zip(*values, strict=True), strict=True):
                rows.append((layer, *step, order, number, average_defined(of_sequences), *bound_mean(of_sequences)))
    return pd.DataFrame(rows, columns=["layer", "component", "before", "after", "order", "removed", "value", *BOUNDS])


def ff_energy(vectors: _Scopes) -> Tensor:
    """Returns the mean square of what the feed-forward network adds to each dimension, ``[L, d]``, in float64.

    Over the real query tokens of all sequences, of the ``total`` of the scope that ends in ``_ff`` (one of
    ``vectors``, as for `cancellation`): the network's output with all biases. Raises ValueError where there is none.

    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope="atb_ff")
    >>> ffattr.analysis.ff_energy([vectors]).shape
    torch.Size([3, 40])
    """
    by_scope = _group_by_scope(vectors)
    ff = by_scope[find_ff_output(list(by_scope))]
    energy: Tensor = ff.total.double().square().sum((1, 2)) / _mark_real_queries(ff).sum()  # padding is zero
    return energy


@names_missing_extra
def norm_balance(vectors: _Scopes) -> pandas.DataFrame:
    """Measures how long the feed-forward network's output is beside what the residual connection adds to it.

    A long bypass swamps the network's effect on the map, and ``RES`` undoes ``FF``. For every layer the means over
    real query tokens of ``ff = ||FF(x_i)||`` and of ``bypass = ||y_i - FF(x_i)||``, where ``y_i`` is the sum with the
    residual (of a post-LN layer the output of the attention block, of a pre-LN layer the stream before the norm), and
    ``ratio``, the first mean over the second (no mean of ratios). One row per layer: ``layer``,
    ``ff``, ``bypass``, ``ratio``.

    ``vectors`` as for `cancellation`, with the scopes that end in ``_ff`` and ``_ff_res`` among them; only ``total`` is
    looked at. Raises ValueError where one is missing.

    >>> scopes = ["atb_ff", "atb_ff_res"]
    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope=scopes)
    >>> list(ffattr.analysis.norm_balance(vectors))
    ['layer', 'ff', 'bypass', 'ratio']
    """
    import pandas as pd

    by_scope = _group_by_scope(vectors)
    scope = find_ff_output(list(by_scope))
    ff, behind = by_scope[scope], join_residual(scope)
    if behind not in by_scope:
        raise ValueError(f"no vectors of {behind} among those of {', '.join(by_scope)}: what is bypassed is in them")
    real = _mark_real_queries(ff)
    of_ff = ff.total.double().norm(dim=-1)[:, real]  # [L, real tokens]
    bypass = (by_scope[behind].total.double() - ff.total.double()).norm(dim=-1)[:, real]
    frame = pd.DataFrame({name: of.mean(1).cpu().numpy() for name, of in (("ff", of_ff), ("bypass", bypass))})
    frame["ratio"] = frame["ff"] / frame["bypass"]
    frame.insert(0, "layer", list(ff.layers))
    return frame


def _group_by_scope(vectors: _Scopes) -> dict[str, Decomposed]:
    """Returns the vectors by scope. Raises ValueError where they are not of the same inputs, layers and queries."""
    vectors = list(vectors.values()) if isinstance(vectors, Mapping) else vectors
    if vectors is not None and not isinstance(vectors, Sequence):
        read_summed_values(vectors)  # what is no vectors at all is said to be none
        raise TypeError("vectors of one scope, expected a list of those of scopes that follow each other")
    if not vectors:
        raise ValueError("no vectors: expected those of scopes that follow each other, for instance of atb and atb_ff")
    first = vectors[0]
    for one in vectors:
        same = (
            read_summed_values(one).shape == read_summed_values(first).shape
            and tuple(one.layers) == tuple(first.layers)
            and tuple(one.queries) == tuple(first.queries)
            and one.mask.equal(first.mask)
        )
        if not same:
            raise ValueError(
                f"the vectors of {first.scope} and {one.scope} are not of the same inputs, layers and queries: "
                f"{list(first.values.shape)} of layers {list(first.layers)}, {list(one.values.shape)} of layers "
                f"{list(one.layers)}"
            )
    return {one.scope: one for one in vectors}


def _mark_real_queries(vectors: Decomposed) -> Tensor:
    """Returns ``[B, N]``, True at query tokens that are no padding."""
    queries = torch.tensor(list(vectors.queries), dtype=torch.long, device=vectors.mask.device)
    return vectors.mask[:, queries].to(vectors.total.device)


def _looks_ahead(vectors: Decomposed) -> bool:
    """Tells whether anything comes from a key after the query."""
    return any(bool(vectors.values[:, :, row, query + 1 :].any()) for row, query in enumerate(vectors.queries))


def _sort_cuts(removed: Sequence[int], width: int) -> list[int]:
    """Returns the numbers in order, each once. Raises ValueError for one that is none."""
    if not removed:
        raise ValueError("removed is empty, expected numbers of dimensions, for instance [0, 1, 2]")
    for k in removed:
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < width:
            raise ValueError(
                f"removed has {k!r}, expected integers from 0 to {width - 1}: the vectors are {width} wide"
            )
    return sorted(set(removed))


def _order_dimensions(by_scope: dict[str, Decomposed], order: str, scores: Tensor | None, seed: int) -> Tensor:
    """Returns the dimensions of every layer, those that go first in front: ``[L, d]``."""
    one = next(iter(by_scope.values()))
    shape = len(one.layers), one.values.shape[-1]
    if scores is not None:
        if scores.shape not in (shape, shape[1:]):
            raise ValueError(f"scores have shape {list(scores.shape)}, expected {list(shape)} (layers, dimensions)")
        scores = scores.detach().expand(shape)
    elif order == "ff":
        scores = ff_energy(list(by_scope.values()))
    elif order == "random":
        generators = (torch.Generator().manual_seed((seed << 16) + layer) for layer in one.layers)
        scores = torch.stack([torch.rand(shape[1], generator=generator) for generator in generators])
    else:
        raise ValueError(f"order={order!r}, expected 'ff', 'random', or a name of your own together with scores")
    return scores.to(one.values.device).sort(dim=-1, descending=True, stable=True).indices


def _sum_remaining_squares(values: Tensor, order: Tensor, cuts: Sequence[int]) -> Tensor:
    """Returns squared norms without the first ``k`` dimensions of ``order`` ``[d]``, for each ``k`` of ``cuts``.

    ``values`` are ``[N, T, d]``, the result is ``[K, N, T]``. Ranks are the same as those of the norms. Only sums
    of squares are added up, from the last dimension on, so nothing cancels.
    """
    queries, tokens, width = values.shape
    found = values.new_zeros((len(cuts), queries, tokens), dtype=torch.float64)
    ends = [*cuts[1:], width]
    step = max(1, _AT_ONCE // max(1, tokens * width))
    for start in range(0, queries, step):
        ordered = values[start : start + step].index_select(-1, order).double().square()
        parts = [ordered[..., cut:end].sum(-1) for cut, end in zip(cuts, ends, strict=True)]
        found[:, start : start + step] = torch.stack(parts).flip(0).cumsum(0).flip(0)
    return found
