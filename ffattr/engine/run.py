"""One layer of a pack of sequences, from weights and attention to the norms of every scope asked for: in blocks of
query tokens, and in smaller ones where memory runs out.

Rows of maps are handed on as soon as they are complete: what becomes of them is not decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.reference import Stream
from ..decomposition.scopes import CROSS
from ..errors import NonFiniteError, OutOfMemory
from ..ops.out_of_memory import Refusals
from .layer_maps import Layer, Rows, Tiled
from .pack import OneSequence, Pack, Part
from .plan import LayerPlan, free_bytes

__all__ = ["Done", "Emit", "run"]

_log = logging.getLogger("ffattr")

Emit = Callable[[int, Tensor, dict[str, Tensor]], None]
"""Takes complete rows: the number of their sequence in the pack, which of its queries they are ``[n]``, and by scope
the rows ``[..., n, C]``, in as many columns as the sequence has."""


@dataclass(frozen=True)
class Done:
    """What is left of a pack's ``N`` queries beside the rows of their maps: ``bias[scope]`` ``[N]`` (zero where a scope
    is told apart by head or expert), the layer's ``output`` ``[N, d]``, recomputed, and the plan that ran; by scope,
    how far a sketch is expected to be off."""

    bias: dict[str, Tensor]
    output: Tensor
    plan: LayerPlan
    sketch_error: dict[str, float]


def run(layer: Layer, pack: Pack, plan: LayerPlan, emit: Emit) -> Done:
    """All maps of the queries of ``pack`` at a layer, in the blocks of ``plan``.

    Where memory runs out, it goes on in halves of them, quarters and so on. Raises `OutOfMemory` where the smallest do
    not fit, and `NonFiniteError` where the range of float16 does not do.
    """
    total = len(pack.rows)
    output = pack.x.new_empty(total, layer.weights.width)
    done = Done({name: pack.x.new_zeros(total) for name in layer.scopes}, output, plan, {})
    tiled: Tiled | None = None
    start = 0
    while start < total:
        refusals, found = Refusals(pack.x.device), None
        try:
            if tiled is None and not layer.backend.is_reference:
                tiled = Tiled(layer, pack, plan)
            part = pack.part(start, plan.blocks.queries)
            found = list(_defined(layer, part)) if tiled is None else [tiled.rows(part, plan)]
        except RuntimeError as error:
            if not refusals.caused(error):
                raise
            _log.debug("layer %d ran out of memory in blocks %s: %s", plan.layer, plan.blocks, str(error))
        if found is None:
            # Out of the handler, where the error's traceback still holds the tensors of the run that failed.
            tiled = None
            layer.release()
            if pack.x.is_cuda:
                torch.cuda.empty_cache()
            smaller = plan.halved()
            if smaller is None:
                raise OutOfMemory(_too_large(plan, pack.x.device))
            plan = smaller
            continue
        for rows in found:
            _hand_on(rows, plan, emit)
            for name, bias in rows.bias.items():
                done.bias[name][rows.part.places] = bias
            done.output[rows.part.places] = rows.output
        start += sum(len(rows.part) for rows in found)
    if tiled is not None:
        done.sketch_error.update(tiled.sketch_error)
    return replace(done, plan=plan)


def _hand_on(found: Rows, plan: LayerPlan, emit: Emit) -> None:
    if plan.dtype == torch.float16 and not all(bool(rows.isfinite().all()) for rows in found.maps.values()):
        raise NonFiniteError(
            f"layer {plan.layer}: its wide products exceed the range of float16; pass dtype=torch.bfloat16 or "
            "dtype=torch.float32"
        )
    pack = found.part.pack
    for number, rows in found.part.sequences():
        if rows.start < rows.stop:
            places = found.part.places[rows] - pack.query_starts[number]
            emit(number, places, {name: found.of(name, number, rows) for name in found.maps})


def _too_large(plan: LayerPlan, device: torch.device) -> str:
    narrower = {torch.float64: "torch.float32", torch.float32: "torch.bfloat16"}.get(plan.dtype)
    return (
        f"layer {plan.layer} ran out of memory: the smallest blocks need {plan.bytes} bytes by the plan, "
        f"{free_bytes(device)} are free on {device}. Ask for fewer layers or queries, pass shorter inputs"
        + (f" or dtype={narrower}" if narrower else "")
        + ", or free what else the device holds."
    )


def _defined(layer: Layer, part: Part) -> Iterator[Rows]:
    """By the definition, one sequence after the other."""
    for number, rows in part.sequences():
        one = part.pack.sequences[number]
        single = Part(part.pack, part.places[rows], number, (rows.stop - rows.start,))
        given = (one.x, one.attention, single.local, layer.rule, layer.value_bias, one.routing, one.encoder)
        found = Rows(single, {}, {}, one.x.new_empty(len(single), layer.weights.width))
        for name, stream in reference.decompose(layer.weights, *given):
            for scope, vectors in _by_source(name, stream, one):
                if scope in layer.scopes:
                    found.maps[scope] = vectors.norm(dim=-1)
                    if stream.bias.numel():  # told apart by head or expert, there is none
                        found.bias[scope] = stream.bias.norm(dim=-1)
            found.output[:] = stream.total if stream.total.numel() else found.output
        yield found


def _by_source(name: str, stream: Stream, one: OneSequence) -> Iterator[tuple[str, Tensor]]:
    """A scope's vectors ``[..., n, C, d]`` of the sequence's own keys and of its encoder's, which come last; before
    both attentions are through, they are on their own."""
    own, tokens = stream.vectors, len(one.x)
    if name.startswith(CROSS):
        yield name, own
        return
    if own.shape[-2] != tokens:
        yield CROSS + name, own[..., tokens:, :]
        own = own[..., :tokens, :]
    yield name, own if one.groups is None else grouped(own, one.groups)


def grouped(vectors: Tensor, groups: Tensor) -> Tensor:
    """Sums ``[..., C, d]`` of the vectors ``[..., T, d]`` of groups of tokens (-1: in none)."""
    kept = groups >= 0
    summed = vectors.new_zeros(*vectors.shape[:-2], int(groups.max()) + 1, vectors.shape[-1])
    return summed.index_add_(-2, groups[kept], vectors[..., kept, :])
