"""What a user asks for, checked against the model once, so that everything after can rely on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import backends, ig
from .adapters import Adapted, resolve
from .backends import Backend
from .dtypes import result_dtype
from .errors import BackendUnavailable, NonFiniteError
from .inputs import Inputs, prepare
from .layer import LayerSpec, LayerWeights
from .plan import LayerPlan, LayerShape, plan_layer
from .reference import Rule

__all__ = ["IG", "Indices", "Request"]

Indices = int | slice | Sequence[int] | None
IG = Literal["exact"] | ig.Riemann | ig.GaussLegendre


@dataclass(frozen=True)
class Request:
    """A model, its inputs and the checked arguments of `ffattr.attribute`.

    ``wide_dtype`` is what the user calls the precision, that of the wide products; all else is in ``dtype``.
    """

    adapted: Adapted
    inputs: Inputs
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[str, ...]
    rule: Rule
    value_bias: str
    dtype: torch.dtype
    wide_dtype: torch.dtype
    device: torch.device
    backend: Backend
    method: str
    memory_budget: int | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        tokenizer: Any,
        scopes: str | Sequence[str],
        layers: Indices,
        queries: Indices,
        ig_rule: IG,
        baseline: str | Tensor,
        value_bias: str,
        dtype: torch.dtype | None,
        backend: str,
        method: str = "auto",
        memory_budget: int | None = None,
    ) -> Request:
        """Raises ValueError, TypeError or an `FfattrError` that names the offending value."""
        adapted = resolve(model)
        prepared = prepare(adapted, model, inputs, tokenizer)
        first = adapted.layers[0]
        if any(spec.scopes != first.scopes for spec in adapted.layers):
            raise ValueError("the layers of this model differ in their norms; attribute them one kind at a time")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}, expected a torch.dtype such as torch.float32, or None")
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget <= 0):
            raise TypeError(f"memory_budget is {memory_budget!r}, expected a positive number of bytes, or None")
        if value_bias not in ("token", "separate"):
            raise ValueError(f"unknown value_bias {value_bias!r}, expected 'token' or 'separate'")
        if dtype == torch.float8_e4m3fn and method == "operator":
            raise ValueError(f"method='operator' does not run in {dtype}; 'direct' is the only one that does")
        wide_dtype, selected = _precision(adapted, dtype, backend)
        chosen = _indices("layers", layers, len(adapted.layers))
        _check_weights(adapted, chosen)
        return cls(
            adapted=adapted,
            inputs=prepared,
            layers=chosen,
            queries=_indices("queries", queries, prepared.mask.shape[1]),
            scopes=_scopes(scopes, first.scopes),
            rule=Rule(*ig.rule_of(ig_rule), baseline=_baseline(baseline, first)),
            value_bias=value_bias,
            dtype=result_dtype(wide_dtype),
            wide_dtype=wide_dtype,
            device=next(adapted.base.parameters()).device,
            backend=selected,
            method=method,
            memory_budget=memory_budget,
        )

    @property
    def wide(self) -> bool:
        """Whether any scope takes d-wide work for every pair."""
        return not set(self.scopes).isdisjoint(self.adapted.layers[0].wide_scopes)

    def plan(self, layer: int, weights: LayerWeights, queries: int, tokens: int, pairs: int) -> LayerPlan:
        """How one layer of one sequence is to be computed."""
        shape = LayerShape.of(weights, queries, tokens, pairs)
        return plan_layer(
            layer, shape, self.wide, self.backend, self.method, self.wide_dtype, self.device, self.memory_budget
        )

    def places(self, layer: int) -> list[int]:
        """Where in the result a layer of the model goes."""
        return [place for place, asked in enumerate(self.layers) if asked == layer]

    def sequence(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """One batch row without its padding: the positions of its tokens, the wanted queries as indices into those,
        and the rows of the map that these queries fill."""
        mask = self.inputs.mask[batch]
        tokens = mask.nonzero()[:, 0]
        queries = torch.tensor(self.queries, device=mask.device, dtype=torch.int64)
        filled = mask[queries].nonzero()[:, 0]
        return tokens, (mask.cumsum(0) - 1)[queries[filled]], filled


def _precision(adapted: Adapted, dtype: torch.dtype | None, backend: str) -> tuple[torch.dtype, Backend]:
    """The dtype of the wide products and who computes them.

    Where the user names no dtype: a half model's own on a GPU, which is made for it, where the backend has it.
    """
    parameter, heads = next(adapted.base.parameters()), max(spec.heads for spec in adapted.layers)
    if dtype is None and parameter.is_cuda and parameter.dtype in (torch.bfloat16, torch.float16):
        try:
            return parameter.dtype, backends.select(backend, parameter.device, parameter.dtype, heads)
        except BackendUnavailable:
            pass  # it then says below why it cannot run at all, or runs in float32
    dtype = result_dtype(parameter.dtype) if dtype is None else dtype
    return dtype, backends.select(backend, parameter.device, dtype, heads)


def _check_weights(adapted: Adapted, layers: Sequence[int]) -> None:
    """Before the forward pass, so that a weight which is no number is named, not the activation that it spoils."""
    for layer in sorted(set(layers)):
        for name, tensor in adapted.layers[layer].weights(None).tensors():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"layer {layer}: {name} has entries that are NaN or infinite")


def _indices(name: str, asked: Indices, count: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(range(count))
    if isinstance(asked, slice):
        return tuple(range(count)[asked])
    if not isinstance(asked, (int, Sequence)) or isinstance(asked, str):
        raise TypeError(f"{name} is {asked!r}, expected an integer, a sequence of integers, a slice or None")
    values = [asked] if isinstance(asked, int) else list(asked)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} has {value!r}, expected integers, a slice or None")
        if not -count <= value < count:
            raise IndexError(f"{name} has {value}, but there are {count}: expected {-count} to {count - 1}")
    return tuple(value % count for value in values)


def _scopes(asked: str | Sequence[str], valid: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(asked, str) and asked == "all":
        return valid
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise TypeError(f"scopes is {asked!r}, expected a scope's name or a sequence of names")
    names = {valid[-1] if name == "layer" else name for name in ([asked] if isinstance(asked, str) else asked)}
    unknown = sorted(names.difference(valid))
    if unknown or not names:
        wrong = f"unknown scope {unknown[0]!r}" if unknown else "no scope given"
        raise ValueError(f"{wrong}; this architecture has: {', '.join(valid)} ('layer' for the last, 'all' for all)")
    return tuple(name for name in valid if name in names)


def _baseline(baseline: str | Tensor, spec: LayerSpec) -> str | Tensor:
    if isinstance(baseline, str):
        if baseline not in ("zero", "bias"):
            raise ValueError(f"unknown baseline {baseline!r}, expected 'zero', 'bias' or a tensor [F]")
        return baseline
    if not isinstance(baseline, Tensor):
        raise TypeError(f"baseline is {baseline!r}, expected 'zero', 'bias' or a tensor [F]")
    width = spec.weights(None).ff_width
    gated = spec.gate is not None
    if list(baseline.shape) not in ([width], [2, width] if gated else [width]):
        expected = f"[{width}]" + (f" (gate, with up at zero) or [2, {width}] (gate and up)" if gated else "")
        raise ValueError(f"baseline has shape {list(baseline.shape)}, expected {expected}")
    if not torch.isfinite(baseline).all():
        raise ValueError("baseline has entries that are NaN or infinite")
    return baseline
