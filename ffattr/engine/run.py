"""One layer of a pack of sequences, from weights and attention to the norms of every scope asked for: in blocks of
query tokens, and in smaller ones where memory runs out; or, signed, to what a direction reads of the same vectors.

Rows of maps are handed on as soon as they are complete: what becomes of them is not decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.adjoint.layer import LayerAdjoint
from ..decomposition.reference import ScopeVectors
from ..decomposition.scopes import Scope
from ..errors import NonFiniteError, OutOfMemory
from ..ops.out_of_memory import OutOfMemoryWatch
from ..ops.reduction import reduce_vectors
from .layer_maps import LayerMaps, LayerTask, MapRows
from .pack import OneSequence, Pack, QueryBlock, shift_index
from .planning.plan import LayerPlan, free_bytes
from .query_pass import Slopes

__all__ = ["LayerResult", "TakeRows", "group_vectors", "project_layer", "run_layer"]

_log = logging.getLogger("ffattr")

TakeRows = Callable[[int, Tensor, dict[Scope, Tensor]], None]
"""Takes complete rows: the number of their sequence in the pack, which of its queries they are ``[n]``, and by scope
the rows ``[..., n, C]``, in as many columns as the sequence has."""


Largest = tuple[tuple[Scope, ...], Tensor]
"""Scopes, and of each the largest magnitude of some of its numbers."""


@dataclass(frozen=True)
class LayerResult:
    """What is left of a pack's ``N`` queries beside the rows of their maps: ``bias[scope]`` ``[N]`` (zero in a scope
    per head or expert), the layer's ``output`` ``[N, d]``, recomputed, and the plan that ran; by scope, how far a
    sketch is expected to be off."""

    bias: dict[Scope, Tensor]
    output: Tensor
    plan: LayerPlan
    sketch_error: dict[Scope, float]

    def take_rows(self, found: MapRows) -> LayerResult:
        """The result with what some rows say beside their maps: written into it, or, of all queries, as it is."""
        if len(found.queries) == len(self.output):
            return replace(self, bias=dict(found.bias), output=found.output)
        at = found.queries.index_in_pack
        for scope, bias in found.bias.items():
            if scope not in self.bias:
                self.bias[scope] = bias.new_zeros(len(self.output))
            self.bias[scope][at] = bias
        self.output[at] = found.output
        return self


def run_layer(task: LayerTask, pack: Pack, plan: LayerPlan, take: TakeRows) -> LayerResult:
    """All maps of the queries of ``pack`` at a layer, in the blocks of ``plan``.

    Where memory runs out, it goes on in halves of them, quarters and so on. Raises `OutOfMemory` where the smallest do
    not fit, and `NonFiniteError` where the range of a dtype does not do.
    """
    total = len(pack.query_tokens)
    result = LayerResult({}, pack.x.new_empty(total, task.weights.width), plan, {})
    maps: LayerMaps | None = None
    largest: list[Largest] = []
    start = 0
    while start < total:
        watch, found = OutOfMemoryWatch(pack.x.device), None
        try:
            if maps is None and not task.backend.is_reference:
                maps = LayerMaps(task, pack, plan)
            queries = pack.query_block(start, plan.blocks.queries)
            found = list(_define_rows(task, queries)) if maps is None else [maps.compute_rows(queries, plan)]
        except RuntimeError as error:
            if not watch.explains(error):
                raise
            _log.debug("layer %d ran out of memory in blocks %s: %s", plan.layer, plan.blocks, str(error))
        if found is None:
            # Out of the handler, where the error's traceback still holds the tensors of the run that failed.
            maps = None
            task.release()
            if pack.x.is_cuda:
                torch.cuda.empty_cache()
            smaller = plan.halve_blocks()
            if smaller is None:
                raise OutOfMemory(_explain_shortage(plan, pack.x.device))
            plan = smaller
            continue
        for rows in found:
            _note_largest(largest, rows.maps)
            _hand_on(rows, take)
            result = result.take_rows(rows)
        start += sum(len(rows.queries) for rows in found)
    _check_range(largest, result.bias, plan, "squares of what vectors hold")
    for scope in task.asked:
        if scope not in result.bias:  # told apart by head or expert
            result.bias[scope] = pack.x.new_zeros(total)
    if maps is not None:
        result.sketch_error.update(maps.sketch_error)
    return replace(result, plan=plan)


def project_layer(task: LayerTask, pack: Pack, plan: LayerPlan, direction: Tensor, take: TakeRows) -> LayerResult:
    """The maps ``<direction, F_i(x_j)>`` of all scopes of a layer, handed on as `run_layer` does those of norms.

    ``direction`` ``[d]`` reads the stream at each scope. ``bias`` is what it reads of the bias. It takes as many
    operations as the layer itself, and those of its attention once more for each scope.
    """
    total, slopes = len(pack.query_tokens), Slopes(task.rule, task.backend.require_operators())
    output = pack.x.new_empty(total, task.weights.width)
    bias = {scope: pack.x.new_zeros(total) for scope in task.asked}
    largest: list[Largest] = []
    for number, one in enumerate(pack.sequences):
        adjoint = LayerAdjoint(
            task.weights,
            one.x,
            one.attention,
            1,
            task.rule,
            task.value_bias,
            one.routing,
            one.encoder,
            slopes.compute,
        )
        for block in adjoint.cut_rows(torch.arange(len(one.query_tokens), device=pack.x.device)):
            rows, at = one.query_tokens[block], block + pack.query_starts[number]
            frozen, output[at] = adjoint.freeze_queries(rows)
            found: dict[Scope, Tensor] = {}
            for scope in task.asked:
                flow, bias[scope][at] = adjoint.project_vectors(rows, direction, frozen, scope)
                found[scope] = _add_up_groups(one, scope, flow.tiles[scope.source][0])
            _note_largest(largest, found)
            take(number, block, found)
    _check_range(largest, bias, plan, "products with the direction")
    return LayerResult(bias, output, plan, {})


def _note_largest(largest: list[Largest], maps: Mapping[Scope, Tensor]) -> None:
    """Notes the largest magnitude of each map, NaN if it holds one."""
    for scope, tile in maps.items():
        if tile.numel():
            largest.append(((scope,), torch.linalg.vector_norm(tile, torch.inf).view(1)))


def _check_range(largest: list[Largest], bias: Mapping[Scope, Tensor], plan: LayerPlan, numbers: str) -> None:
    """Raises `NonFiniteError` for scopes whose maps or biases hold NaN or infinity; ``numbers`` is what may be too
    large. A GPU is waited for once a layer."""
    noted = list(largest)
    if bias and next(iter(bias.values())).numel():
        noted.append((tuple(bias), torch.linalg.vector_norm(torch.stack(list(bias.values())), torch.inf, dim=1)))
    scopes = [scope for some, _ in noted for scope in some]
    found = torch.cat([size for _, size in noted]).tolist() if noted else []
    broken = list(dict.fromkeys(str(scope) for scope, size in zip(scopes, found, strict=True) if not isfinite(size)))
    if not broken:
        return
    if plan.dtype == torch.float16:
        why = "its wide products exceed the range of float16; pass dtype=torch.bfloat16 or dtype=torch.float32"
    elif plan.dtype == torch.float64:
        why = f"{numbers} exceed the range of float64, or they hold NaN"
    else:
        why = f"{numbers} exceed the range of float32 (3.4e38), or they hold NaN; pass dtype=torch.float64"
    raise NonFiniteError(f"layer {plan.layer}, {', '.join(broken)}: {why}")


def _hand_on(found: MapRows, take: TakeRows) -> None:
    pack = found.queries.pack
    for number, queries in found.queries.sequences():
        if queries.start < queries.stop:
            index = shift_index(found.queries.index_in_pack[queries], -pack.query_starts[number])
            take(number, index, {scope: found.of_sequence(scope, number, queries) for scope in found.maps})


def _explain_shortage(plan: LayerPlan, device: torch.device) -> str:
    narrower = {torch.float64: "torch.float32", torch.float32: "torch.bfloat16"}.get(plan.dtype)
    return (
        f"layer {plan.layer} ran out of memory: the smallest blocks need {plan.bytes} bytes by the plan, "
        f"{free_bytes(device)} are free on {device}. Ask for fewer layers or queries, pass shorter inputs"
        + (f" or dtype={narrower}" if narrower else "")
        + ", or free what else the device holds."
    )


def _define_rows(task: LayerTask, queries: QueryBlock) -> Iterator[MapRows]:
    """Rows by the definition, one sequence after the other."""
    for number, some in queries.sequences():
        one = queries.pack.sequences[number]
        single = QueryBlock(queries.pack, queries.index_in_pack[some], number, (some.stop - some.start,))
        found = MapRows(single, {}, {}, one.x.new_empty(len(single), task.weights.width))
        given = (one.x, one.attention, single.token_in_sequence, task.rule, task.value_bias, one.routing, one.encoder)
        for point, stream in reference.decompose(task.weights, *given):
            apart = point.axis is not None  # then there is no bias
            whole = stream.vectors.sum(-2) if apart else stream.total
            for scope, vectors in _split_sources(point, stream, one):
                if scope in task.scopes:
                    found.maps[scope] = reduce_vectors(vectors, task.reduction, whole[..., None, :])
                    if not apart:
                        found.bias[scope] = reduce_vectors(stream.bias, task.reduction, whole)
            found.output[:] = found.output if apart else whole
        task.finish_rows(found.maps, found.bias)
        yield found


def _split_sources(scope: Scope, stream: ScopeVectors, one: OneSequence) -> Iterator[tuple[Scope, Tensor]]:
    """A scope's vectors ``[..., n, C, d]`` of the sequence's own keys and of its encoder's, which come last; before
    both attentions are through, they are on their own."""
    own, tokens = stream.vectors, len(one.x)
    if scope.source == "cross":
        yield scope, own
        return
    if own.shape[-2] != tokens:
        yield scope.seen_from("cross"), own[..., tokens:, :]
        own = own[..., :tokens, :]
    yield scope, own if one.groups is None else group_vectors(own, one.groups)


def group_vectors(vectors: Tensor, groups: Tensor) -> Tensor:
    """Sums ``[..., C, d]`` of the vectors ``[..., T, d]`` of groups of tokens (-1: in none)."""
    kept = groups >= 0
    summed = vectors.new_zeros(*vectors.shape[:-2], int(groups.max()) + 1, vectors.shape[-1])
    return summed.index_add_(-2, groups[kept], vectors[..., kept, :])


def _add_up_groups(one: OneSequence, scope: Scope, tile: Tensor) -> Tensor:
    """The columns of keys ``[..., n, T]`` as those of their groups, where keys are added up."""
    if one.groups is None or scope.source == "cross":
        return tile
    real = one.groups >= 0
    columns = int(one.groups.max()) + 1 if bool(real.any()) else 0
    return tile.new_zeros(*tile.shape[:-1], columns).index_add_(-1, one.groups[real], tile[..., real])
