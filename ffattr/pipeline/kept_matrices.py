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

from ..decomposition.affine import Norm
from ..decomposition.layer import LayerWeights
from ..engine.recall import Make, Recall, make_anew

__all__ = ["LIMIT", "recall_with"]

LIMIT = 1 << 28
"""Bytes that are kept of one model at the most, of its first layers where it has more: those of BERT-base fit."""


@dataclass(frozen=True)
class _Origin:
    """What matrices were made of: ``where`` the weights are, in which version, and how products are computed; and
    ``content``, vectors and the matrices' products with random ones, which show what was written past all versions."""

    where: tuple[object, ...]
    content: Tensor

    def is_same(self, other: _Origin) -> bool:
        return self.where == other.where and torch.equal(self.content, other.content)


@dataclass
class _Layer:
    origin: _Origin
    matrices: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.matrices.values() for tensor in tensors)


_models: WeakKeyDictionary[nn.Module, dict[object, _Layer]] = WeakKeyDictionary()


def recall_with(base: nn.Module, layer: int, weights: LayerWeights) -> Recall:
    """Returns what gives matrices of a layer of ``base``: those of an earlier call where its weights are the same, and
    new ones elsewhere.

    Nothing is kept of matrices that are no parameters of the model but made for the call (in another dtype, with
    adapters), nor on a GPU.
    """
    matrices = [tensor for _, tensor in weights.tensors() if tensor.dim() > 1]
    own = {_storage_of(parameter) for parameter in base.parameters() if parameter.device.type == "cpu"}
    if any(tensor.is_inference() or _storage_of(tensor) not in own for tensor in matrices):
        return make_anew
    layers = _models.setdefault(base, {})
    kept: _Layer | None = None

    def recall(name: str, make: Make) -> list[Tensor]:
        nonlocal kept
        if kept is None:
            origin = _read_origin(weights)
            kept = layers.get(layer)
            if kept is None or not kept.origin.is_same(origin):
                kept = layers[layer] = _Layer(origin)
        found = kept.matrices.get(name)
        if found is None:
            found = make()
            size = sum(tensor.nbytes for tensor in found)
            apart = all(_storage_of(tensor) not in own for tensor in found)
            if apart and size + sum(one.bytes for one in layers.values()) <= LIMIT:
                kept.matrices[name] = found
        return found

    return recall


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read_origin(weights: LayerWeights) -> _Origin:
    where: list[object] = [torch.get_num_threads(), torch.get_float32_matmul_precision()]
    content = []
    for owner in (weights, *(() if weights.cross is None else (weights.cross,))):
        where += [part.kind for part in vars(owner).values() if isinstance(part, Norm)]
    for name, tensor in weights.tensors():
        where += [name, tensor.dtype, tensor.shape]
        if tensor.dim() > 1:
            where += [tensor._version, tensor.data_ptr(), tensor.stride()]
            tensor = tensor @ _draw_vector(tensor.shape[1], tensor.dtype)
        content.append(tensor.double())
    return _Origin(tuple(where), torch.cat(content))


@functools.lru_cache(maxsize=16)
def _draw_vector(length: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)
