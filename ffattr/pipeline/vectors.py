"""`vectors`: what each token brings to each token, before any norm is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..decomposition import reference
from ..decomposition.attention import LayerRecord
from ..decomposition.layer import edit_weights
from ..decomposition.reference import ScopeVectors
from ..decomposition.scopes import Scope
from ..results.contents import Labelled
from ..results.kept.policy import require_room
from ..selection import Indices
from .assemble import CapturedSequence, find_errors, layer_tolerance, require_reproduced
from .entrance import accept_containers, name_broken_weights
from .options import IG, Options
from .request import Request
from .stack import Stack

__all__ = ["Vectors", "vectors"]

_AT_ONCE = 2**24  # numbers of the largest tensor of a block of queries


@dataclass(frozen=True)
class Vectors(Labelled):
    """The decomposed vectors of one scope: ``values.sum(-2) + bias == total``.

    ``values`` ``[layers, B, queries, T, d]`` (told apart by head or expert: ``[layers, B, heads, queries, T, d]``),
    ``bias`` and ``total`` ``[layers, B, queries, d]`` (zero where told apart). Padding is zero. Of a scope of
    cross-attention the ``T`` tokens are the encoder's, ``key_tokens``; from ``atb`` on, the decoder's are missing from
    its sum, and the encoder's from that of a decoder's scope. ``mask`` ``[B, T]`` is True at real tokens, ``key_mask``
    at those of the encoder where keys are its tokens. ``checked``: layers' outputs were compared with the model's.
    ``labels`` are the tokens in the case of the text (None: they are no other), by which tables call them.

    >>> found = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope="atb")
    >>> torch.allclose(found.values.sum(-2) + found.bias, found.total)
    True
    """

    values: Tensor
    bias: Tensor
    total: Tensor
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scope: str
    mask: Tensor
    key_tokens: list[list[str]] | None = None
    key_mask: Tensor | None = None
    checked: bool = True
    labels: list[list[str]] | None = None

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.values.shape))
        return f"Vectors({self.scope}, {shape}, layers {list(self.layers)}{'' if self.checked else '; unchecked'})"


@overload
def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scopes: str = ...,
    tokenizer: Any = ...,
    layers: Indices = ...,
    queries: Indices = ...,
    ig: IG = ...,
    baseline: str | Tensor = ...,
    value_bias: str = ...,
    dtype: torch.dtype | None = ...,
    check: bool = ...,
    scope: None = ...,
) -> Vectors: ...


@overload
def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scopes: list[str] | tuple[str, ...],
    tokenizer: Any = ...,
    layers: Indices = ...,
    queries: Indices = ...,
    ig: IG = ...,
    baseline: str | Tensor = ...,
    value_bias: str = ...,
    dtype: torch.dtype | None = ...,
    check: bool = ...,
    scope: None = ...,
) -> dict[str, Vectors]: ...


@overload
def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scope: str,
    tokenizer: Any = ...,
    layers: Indices = ...,
    queries: Indices = ...,
    ig: IG = ...,
    baseline: str | Tensor = ...,
    value_bias: str = ...,
    dtype: torch.dtype | None = ...,
    check: bool = ...,
) -> Vectors: ...


@overload
def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scope: list[str] | tuple[str, ...],
    tokenizer: Any = ...,
    layers: Indices = ...,
    queries: Indices = ...,
    ig: IG = ...,
    baseline: str | Tensor = ...,
    value_bias: str = ...,
    dtype: torch.dtype | None = ...,
    check: bool = ...,
) -> dict[str, Vectors]: ...


@accept_containers
@name_broken_weights
def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scopes: str | list[str] | tuple[str, ...] = "layer",
    tokenizer: Any = None,
    layers: Indices = None,
    queries: Indices = None,
    ig: IG = "exact",
    baseline: str | Tensor = "zero",
    value_bias: str = "token",
    dtype: torch.dtype | None = None,
    check: bool = True,
    scope: str | list[str] | tuple[str, ...] | None = None,
) -> Vectors | dict[str, Vectors]:
    """The vectors themselves, materialised: what each token contributes to each query token, before any norm.

    Arguments as for `attribute`; ``scopes`` is one name, or several: then one `Vectors` for each, by name, of one pass.
    ``scope`` is another name of it, as one is mostly asked for.
    With ``check`` every layer's recomputed output at the queries is compared with the model's, as `attribute` does.
    Meant for a few queries and layers: raises ValueError where the result would not fit the free memory.

    >>> found = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, layers=[2], queries=[-1])
    >>> found.values.shape  # layers, sequences, queries, tokens, width
    torch.Size([1, 1, 1, 6, 40])
    >>> list(ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scopes=["atb", "layer"]))
    ['atb', 'atb_ff_res_ln']
    """
    asked = scopes if scope is None else scope
    options = Options(asked, layers, queries, None, None, ig, baseline, value_bias, dtype, "reference")
    request = Request.from_options(model, inputs, tokenizer, options)
    names = [str(name) for stack in request.stacks for name in stack.scopes]
    if isinstance(asked, str) and len(names) != 1:
        raise ValueError(f"scopes={asked!r} names {len(names)} scopes, expected one of them, or a list of names")
    _check_room(request)
    filled = {
        (stack.name, name): _VectorSink.for_scope(request, stack, name)
        for stack in request.stacks
        for name in stack.scopes
    }

    def on_layer(captured: LayerRecord) -> None:
        stack = request.stack_of_layer(captured.index)
        layer = captured.index - stack.first
        weights = edit_weights(stack.specs[layer].weights(request.dtype), captured.edits)
        for row in range(len(stack.mask)):
            one = CapturedSequence.from_record(request, stack, captured, row, row)
            of_one, given = one.sequence, (request.rule, value_bias, one.sequence.routing, one.sequence.encoder)
            # A dense layer among mixtures has no experts.
            wanted = [name for name in stack.scopes if weights.mixture or name.axis != "expert"]
            neurons = max(branch.width for branch in weights.branches)
            at_once = max(1, _AT_ONCE // (of_one.keys * max(weights.heads * weights.width, 2 * neurons)))
            blocks = (one.result_rows, of_one.query_tokens, one.output)
            for rows, tokens, output in zip(*(block.split(at_once) for block in blocks), strict=True):
                streams = reference.decompose(weights, of_one.x, of_one.attention, tokens, *given)
                for name, stream in _pick_scopes(streams, wanted):
                    filled[stack.name, name].add(stream, one, stack.result_layers(layer), rows)
                if check:
                    recomputed = reference.compute_output(weights, of_one.x, of_one.attention, tokens, *given[2:])
                    error, allowed = find_errors([output], recomputed), layer_tolerance(stack, captured, request.dtype)
                    require_reproduced(request, stack, layer, row, float(error), allowed, captured.changed)

    request.run_model(request.inputs, on_layer, check)
    found = {str(name): filled[stack.name, name].vectors(check) for stack in request.stacks for name in stack.scopes}
    return found[names[0]] if isinstance(asked, str) else found


@dataclass(frozen=True)
class _VectorSink:
    """Vectors of one scope while they come in."""

    stack: Stack
    scope: Scope
    values: Tensor
    bias: Tensor
    total: Tensor

    @classmethod
    def for_scope(cls, request: Request, stack: Stack, scope: Scope) -> _VectorSink:
        values = torch.zeros(_shape_vectors(request, stack, scope), dtype=request.dtype, device=stack.mask.device)
        shape = (len(stack.layers), len(stack.mask), len(stack.queries), values.shape[-1])
        return cls(stack, scope, values, values.new_zeros(shape), values.new_zeros(shape))

    def add(self, stream: ScopeVectors, one: CapturedSequence, layers: Sequence[int], rows: Tensor) -> None:
        """Take the vectors of the queries ``rows`` of a sequence, at the places ``layers`` on the layer axis."""
        own = len(one.sequence.x)
        if self.scope.source == "own":
            keys, of_keys = one.token_positions, stream.vectors[..., :own, :]
        else:  # alone, or the last of those of a stream
            keys = one.encoder_positions
            of_keys = stream.vectors[..., stream.vectors.shape[-2] - len(keys) :, :]
        for place in layers:
            self.values[place, one.batch][..., rows[:, None], keys, :] = of_keys.to(self.values.device)
            if stream.bias.numel():
                self.bias[place, one.batch, rows] = stream.bias.to(self.bias.device)
                self.total[place, one.batch, rows] = stream.total.to(self.total.device)

    def vectors(self, checked: bool) -> Vectors:
        stack, across = self.stack, self.scope.source == "cross"
        key_tokens, key_mask = (stack.encoder_tokens, stack.encoder_mask) if across else (None, None)
        numbers, scope, layers = (self.values, self.bias, self.total), str(self.scope), stack.model_layers
        tokens, queries = stack.tokens, stack.queries
        return Vectors(
            *numbers, tokens, layers, queries, scope, stack.mask, key_tokens, key_mask, checked, stack.labels
        )


def _pick_scopes(
    streams: Iterator[tuple[Scope, ScopeVectors]], scopes: Sequence[Scope]
) -> Iterator[tuple[Scope, ScopeVectors]]:
    """The streams at ``scopes``, and no further: those after the last of them are not computed."""
    missing = set(scopes)
    for scope, stream in streams:
        # From atb on, those of the encoder's tokens are in the same stream.
        joined = scope.point not in ("attn", "attn_res")
        found = missing & ({scope, scope.seen_from("cross")} if joined else {scope})
        yield from ((one, stream) for one in found)
        missing -= found
        if not missing:
            return


def _shape_vectors(request: Request, stack: Stack, scope: Scope) -> tuple[int, ...]:
    return (*stack.map_shape(scope), stack.specs[0].weights(request.dtype).width)


def _check_room(request: Request) -> None:
    """Raises ValueError where there is not enough for the vectors ``[..., T, d]`` of all scopes."""
    numbers = sum(math.prod(_shape_vectors(request, stack, name)) for stack in request.stacks for name in stack.scopes)
    remedy = "ask for fewer layers or queries, or for norms with ffattr.attribute"
    require_room("the vectors", numbers, request.dtype.itemsize, remedy)
