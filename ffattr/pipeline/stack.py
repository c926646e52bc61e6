"""What is asked of one stack of layers: of a model that has but one, of its encoder, or of its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..decomposition.scopes import Scope, Source
from ..errors import UnsupportedModel
from ..models.inputs.groups import Groups
from ..models.inputs.prepare import Inputs
from ..models.registry import ModelDescription
from ..models.spec.layer import LayerSpec
from ..selection import Indices, indices
from .options import Options
from .scopes import parse_scopes

__all__ = ["SequenceIndex", "Stack", "build_stacks"]


class SequenceIndex(NamedTuple):
    """One batch row without its padding: the positions ``tokens`` ``[T]`` of its tokens in the padded input, which of
    these are the wanted queries, ``query_tokens`` ``[n]``, and the rows of the maps that these fill, ``result_rows``
    ``[n]``."""

    tokens: Tensor
    query_tokens: Tensor
    result_rows: Tensor


@dataclass(frozen=True)
class Stack:
    """What is asked of one stack of layers: of a model that has but one (``name`` ""), of its encoder or its decoder.

    ``layers`` are counted within ``specs``, whose first is layer ``first`` of the model. ``queries`` are positions of
    the padded input. ``mask`` ``[B, T]`` and ``tokens`` are the stack's own, ``encoder_mask`` ``[B, T']`` that of the
    tokens that cross-attention reads, ``groups`` what its keys are added up in. ``numbers`` are what the model calls
    ``specs``, where it has other layers between them. ``labels`` are the tokens in the case of the text.
    """

    name: str
    first: int
    specs: tuple[LayerSpec, ...]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[Scope, ...]
    mask: Tensor
    tokens: list[list[str]]
    encoder_mask: Tensor | None = None
    encoder_tokens: list[list[str]] | None = None
    groups: Groups | None = None
    numbers: tuple[int, ...] | None = None
    labels: list[list[str]] | None = None

    @property
    def model_layers(self) -> tuple[int, ...]:
        """The numbers of the asked layers among all that the model has, those that do not attend too."""
        return tuple(self.number_layer(layer) for layer in self.layers)

    def number_layer(self, layer: int) -> int:
        """Returns the number that the model has for a layer of the stack."""
        return layer if self.numbers is None else self.numbers[layer]

    @property
    def ff_scopes(self) -> int:
        """How many scopes take feed-forward work for every pair, those of both sources of keys as one."""
        pairwise = {*self.specs[0].pairwise_scopes, self.specs[0].expert_scope}
        return len(pairwise & {scope.seen_from("own") for scope in self.scopes})

    @property
    def by_expert(self) -> bool:
        """Whether any scope is per expert."""
        return any(scope.axis == "expert" for scope in self.scopes)

    def label_layer(self, layer: int) -> str:
        """What messages call a layer of the stack."""
        return f"{self.name} layer {self.number_layer(layer)}".strip()

    def result_layers(self, layer: int) -> list[int]:
        """Returns the places on the layer axis of the result to which a layer of the stack goes."""
        return [place for place, asked in enumerate(self.layers) if asked == layer]

    def index_sequence(self, batch: int) -> SequenceIndex:
        """Returns one batch row without its padding."""
        if batch not in self._indexed:
            mask = self.mask[batch]
            queries = torch.tensor(self.queries, device=mask.device, dtype=torch.int64)
            result_rows = mask[queries].nonzero()[:, 0]
            query_tokens = (mask.cumsum(0) - 1)[queries[result_rows]]
            self._indexed[batch] = SequenceIndex(mask.nonzero()[:, 0], query_tokens, result_rows)
        return self._indexed[batch]

    @cached_property
    def _indexed(self) -> dict[int, SequenceIndex]:
        """The rows that were asked for, which are the same in all layers."""
        return {}

    def encoder_positions(self, batch: int) -> Tensor | None:
        """The positions of the encoder's tokens of one batch row, where cross-attention reads them."""
        return None if self.encoder_mask is None else self.encoder_mask[batch].nonzero()[:, 0]

    def key_mask(self, source: Source) -> Tensor:
        """Which columns of the maps of a source's keys are real, ``[B, T]``."""
        mask = self.encoder_mask if source == "cross" else self.mask if self.groups is None else self.groups.mask
        assert mask is not None
        return mask

    def map_shape(self, scope: Scope) -> tuple[int, ...]:
        """The shape of the maps of a scope, ``[L, B, N, T]``, with an axis before ``N`` per head or expert."""
        shape = [len(self.layers), len(self.mask), len(self.queries), self.key_mask(scope.source).shape[1]]
        spec = self.specs[0]
        if scope.axis == "head":
            shape.insert(2, spec.cross.heads if scope.source == "cross" and spec.cross is not None else spec.heads)
        elif scope.axis == "expert":
            shape.insert(2, max(spec.networks_per_token for spec in self.specs))
        return tuple(shape)


def build_stacks(
    description: ModelDescription, inputs: Inputs, options: Options, groups: Groups | None
) -> tuple[Stack, ...]:
    """The stacks that any scope is asked of. Raises ValueError, TypeError or IndexError naming the offending value."""
    found = []
    ranges = description.stacks or {"": range(len(description.layers))}
    specs = {name: tuple(description.layers[index] for index in numbers) for name, numbers in ranges.items()}
    for name, of_stack in specs.items():
        if any(spec.scopes != of_stack[0].scopes for spec in of_stack):
            raise ValueError(
                f"the layers of this {name or 'model'} differ in their norms; attribute them one kind at a time"
            )
    for name, scopes in parse_scopes(options.scopes, specs).items():
        side = inputs.encoder if name == "encoder" else inputs
        assert side is not None
        encoder = inputs.encoder if name == "decoder" else None
        what = f"{name} " if name else ""
        found.append(
            Stack(
                name,
                ranges[name].start,
                specs[name],
                _choose_layers(f"{what}layers", options.layers, len(specs[name]), description),
                indices(f"{what}queries", options.queries, side.mask.shape[1]),
                scopes,
                side.mask,
                side.tokens,
                None if encoder is None else encoder.mask,
                None if encoder is None else encoder.tokens,
                groups,
                description.numbers,
                None if name == "encoder" else inputs.labels,
            )
        )
    return tuple(found)


def _choose_layers(name: str, asked: Indices, count: int, description: ModelDescription) -> tuple[int, ...]:
    """Returns which of ``count`` layers are asked for. Raises `UnsupportedModel` for one that does not attend."""
    if description.numbers is None:
        return indices(name, asked, count)
    place = {number: index for index, number in enumerate(description.numbers)}
    numbers = indices(name, asked, count + len(description.left_out))
    if asked is None or isinstance(asked, slice):
        numbers = tuple(number for number in numbers if number in place)
    for number in numbers:
        if number not in place:
            raise UnsupportedModel(
                f"layer {number} of {type(description.base).__name__} is a {description.left_out[number]} without "
                f"attention, so that there is no map of it; layers with attention: "
                f"{', '.join(map(str, description.numbers))}"
            )
    return tuple(place[number] for number in numbers)
