"""Matrices that depend on a model's weights alone, kept with the model from one call to the next.

For short texts they cost more than the maps. They are held by a weak reference to the model, in memory of their own: of
the model nothing is kept alive, nor changed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..engine.key_tokens import Make, Recall
from .read_weights import ReadWeights, is_owned, list_storages, locate_matrices

__all__ = ["LIMIT", "recall_with"]

LIMIT = 1 << 28
"""Bytes that are kept of one model at the most, of its first layers where it has more: those of BERT-base fit."""


@dataclass
class _Layer:
    """What was made of a layer, and of what: ``where`` its weights were, in which version, and how products were
    computed; ``content`` shows what was written into them past all versions (``parameter.data``)."""

    where: tuple[object, ...]
    content: Tensor
    matrices: dict[str, list[Tensor]] = field(default_factory=dict)


_models: WeakKeyDictionary[nn.Module, dict[int, _Layer]] = WeakKeyDictionary()


def recall_with(base: nn.Module, number: int, module: nn.Module, read: ReadWeights) -> Recall:
    """Returns what gives matrices of layer ``number`` of ``base``, its ``module``: those of an earlier call where its
    weights are the same, and new ones elsewhere."""

    @functools.cache
    def find_layer() -> _Layer | None:
        if locate_matrices(read.weights) != read.where:  # they have changed since
            return None
        layers = _models.setdefault(base, {})
        where = (*read.where, torch.get_num_threads(), torch.get_float32_matmul_precision())
        kept = layers.get(number)
        if kept is None or kept.where != where or not torch.equal(kept.content, read.content):
            kept = layers[number] = _Layer(where, read.content)
        return kept

    def recall(name: str, make: Make) -> list[Tensor]:
        kept = find_layer()
        if kept is None:
            return make()
        if name in kept.matrices:
            return kept.matrices[name]
        made, storages = make(), list_storages(module)
        apart = not any(is_owned(tensor, storages) for tensor in made)  # or else parameters would be kept alive
        if apart and _count_bytes(_models[base]) + sum(tensor.nbytes for tensor in made) <= LIMIT:
            kept.matrices[name] = made
        return made

    return recall


def _count_bytes(layers: dict[int, _Layer]) -> int:
    # Of copies: another thread may add to them meanwhile.
    made = [made for layer in list(layers.values()) for made in list(layer.matrices.values())]
    return sum(tensor.nbytes for tensors in made for tensor in tensors)
