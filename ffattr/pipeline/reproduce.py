"""How closely each layer of a model follows from its description: what every map of it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..decomposition.attention import LayerRecord
from ..models.capture.recorder import record_layers
from ..results.keep import Dense
from .assemble import ResultBuilder, layer_tolerance
from .entrance import name_broken_weights
from .options import Options
from .request import Request
from .stack import Stack

__all__ = ["Reproduced", "Reproduction", "reproduce"]


@dataclass(frozen=True)
class Reproduced:
    """A layer, counted in its stack, whose name is "" where there is but one.

    ``error`` is the largest relative difference of a token's recomputed output from the model's own, ``tolerance`` the
    largest that rounding explains.
    """

    stack: str
    layer: int
    scopes: tuple[str, ...]
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Reproduction:
    """Every layer of a model, and the request that its description and inputs are in."""

    request: Request
    layers: tuple[Reproduced, ...]

    @property
    def family(self) -> str:
        """The adapter's name: a model type, a class or "structure of" one."""
        return self.request.description.family

    @property
    def error(self) -> float:
        return float(torch.tensor([layer.error for layer in self.layers], dtype=torch.float64).max())  # NaN is largest


@name_broken_weights
def reproduce(model: nn.Module, inputs: Any, tokenizer: Any = None) -> Reproduction:
    """Recompute all layers in one forward pass of the model, those after one that fails too.

    Raises as `ffattr.attribute` does, but for `ArchitectureMismatch`.
    """
    # The output of a layer is the same whichever scopes are asked for: the first ones cost least.
    options = Options("attn", backend="torch")
    request = Request.from_options(model, inputs, tokenizer, options)
    builders = {stack.name: ResultBuilder(request, stack, Dense(), {}, check=False) for stack in request.stacks}
    allowed: dict[tuple[str, int], float] = {}

    def on_layer(captured: LayerRecord) -> None:
        stack = request.stack_of_layer(captured.index)
        builders[stack.name].add_layer(captured, range(len(stack.mask)))
        allowed[stack.name, captured.index - stack.first] = layer_tolerance(stack, captured, request.dtype)

    encoder = request.inputs.encoder
    record_layers(
        request.description,
        request.inputs.kwargs,
        on_layer,
        mask=request.inputs.mask,
        encoder_mask=None if encoder is None else encoder.mask,
    )
    layers = [
        Reproduced(stack.name, stack.number_layer(layer), _list_scopes(stack, layer), error, allowed[stack.name, layer])
        for stack in request.stacks
        for layer, error in zip(stack.layers, builders[stack.name].error.amax(1).tolist(), strict=True)
    ]
    return Reproduction(request, tuple(layers))


def _list_scopes(stack: Stack, layer: int) -> tuple[str, ...]:
    spec = stack.specs[layer]
    return spec.scopes if spec.experts is None else (*spec.scopes, str(spec.expert_scope))
