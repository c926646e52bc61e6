"""The weights of the layers that are asked for: read and checked before the model runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..decomposition.affine import Norm
from ..decomposition.layer import LayerWeights
from ..errors import NonFiniteError, UnsupportedModel
from .stack import Stack

__all__ = ["ReadWeights", "read_weights"]


_finite: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()
"""Layers whose weights were looked at, and where these were, in which version."""


@dataclass(frozen=True)
class ReadWeights:
    """The weights of a layer in the model's own dtype.

    ``owned``: matrices are the layer's parameters themselves, on the CPU, and not made of them for this call (in
    another dtype, with adapters).
    """

    weights: LayerWeights
    owned: bool
    where: tuple[object, ...]
    dtypes: frozenset[torch.dtype]

    @classmethod
    def from_weights(cls, weights: LayerWeights, module: nn.Module) -> ReadWeights:
        """Reads those of the layer ``module``."""
        own = list_storages(module)
        parts = [tensor for _, tensor in weights.tensors()]
        owned = all(tensor.dim() == 1 or is_owned(tensor, own) for tensor in parts)
        where = locate_matrices(weights) if owned else ()
        return cls(weights, owned, where, frozenset(tensor.dtype for tensor in parts))

    @cached_property
    def content(self) -> Tensor:
        """Every vector, and the product of every matrix with a random one: it tells weights from others, and is finite
        only if they are. To look at every weight takes about as long as a short text."""
        return torch.cat([_condense(tensor, self.owned) for _, tensor in self.weights.tensors()])

    def of_dtype(self, dtype: torch.dtype) -> bool:
        """Whether they are what the layer's weights in ``dtype`` are."""
        return self.owned and self.dtypes == {dtype}


def read_weights(stack: Stack) -> dict[int, ReadWeights]:
    """The weights of the wanted layers of a stack, by their numbers in the model; those alone that take no memory.

    Before the forward pass, so that a weight which is no number is named, not the activation that it spoils.
    """
    found = {}
    for layer in sorted(set(stack.layers)):
        spec = stack.specs[layer]
        weights, name_of_layer = spec.weights(None), stack.label_layer(layer)
        for name, tensor in weights.tensors():
            if tensor.device != weights.out.weight.device:
                raise UnsupportedModel(
                    f"{name_of_layer}: {name} is on {tensor.device}, but out.weight on {weights.out.weight.device}; "
                    "expected each layer whole on one device (accelerate's no_split_module_classes)"
                )
        read = ReadWeights.from_weights(weights, spec.module)
        # Whatever is written past all versions afterwards (``parameter.data``) is found in what it does to results.
        seen = read.owned and _finite.get(spec.module) == read.where
        if not seen and not read.content.isfinite().all():  # which also sums are that were too large
            for name, tensor in weights.tensors():
                if not tensor.isfinite().all():
                    raise NonFiniteError(f"{name_of_layer}: {name} has entries that are NaN or infinite")
        if read.owned:
            found[stack.first + layer] = read
            _finite[spec.module] = read.where
    return found


def list_storages(module: nn.Module) -> set[int]:
    """Returns where the memory of a module's parameters is, of plain ones on the CPU."""
    plain = (one for one in module.parameters() if one.is_cpu and type(one) in (Tensor, nn.Parameter))
    return {parameter.untyped_storage().data_ptr() for parameter in plain}


def is_owned(tensor: Tensor, storages: set[int]) -> bool:
    """Whether a tensor is part of that memory, and counts its versions."""
    return tensor.untyped_storage().data_ptr() in storages and not tensor.is_inference()


def locate_matrices(weights: LayerWeights) -> tuple[object, ...]:
    """Returns where the matrices of a layer are, which version they are of, and what norms there are."""
    found: list[object] = []
    for owner in (weights, *(part for part in (weights.cross, weights.latent) if part is not None)):
        found += [part.kind for part in vars(owner).values() if isinstance(part, Norm)]
    for name, tensor in weights.tensors():
        found += [name, tensor.dtype, tensor.shape, tensor.device]
        if tensor.dim() > 1:
            found += [tensor._version, tensor.data_ptr(), tensor.stride()]
    return tuple(found)


def _condense(tensor: Tensor, owned: bool) -> Tensor:
    """Numbers that are finite only if all entries are, in a tenth of the time that it takes to look at each."""
    if tensor.dim() == 1:
        return tensor
    if owned:
        return (tensor @ _draw_vector(tensor.shape[-1], tensor.dtype, tensor.device)).flatten()
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))[None]


@functools.lru_cache(maxsize=16)
def _draw_vector(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # for all later calls
        drawn = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
        return drawn.to(device, dtype)
