"""What a user asks for, checked against the model once, so that everything after can rely on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..decomposition import integrated_gradients as ig
from ..decomposition.attention import LayerRecord
from ..decomposition.layer import LayerWeights
from ..decomposition.precision import result_dtype
from ..decomposition.reference import Rule
from ..decomposition.scopes import CROSS
from ..decomposition.sketch import Sketch
from ..engine.plan import LayerPlan, LayerShape, packs, plan_layer
from ..errors import BackendUnavailable, NonFiniteError, UnsupportedModel
from ..models.capture.recorder import record
from ..models.inputs.groups import Groups
from ..models.inputs.groups import of as groups_of
from ..models.inputs.prepare import Inputs, prepare
from ..models.registry import Adapted, resolve
from ..models.spec.layer import LayerSpec
from ..models.spec.weights import read_linear
from ..ops import backends
from ..ops.backends import Backend
from ..selection import Indices, indices
from .scopes import scopes_of

__all__ = ["IG", "Indices", "Request", "Stack"]

_TOKENS_AT_ONCE = 4096
"""How many tokens, padding included, the model reads at once of texts that are cut into batches: beyond this it runs no
faster, and what is recorded of a layer (a few dozen numbers for each of its widths) stays small."""

IG = Literal["exact"] | ig.Riemann | ig.GaussLegendre


@dataclass(frozen=True)
class Stack:
    """What is asked of one stack of layers: of a model that has but one (``name`` ""), of its encoder or its decoder.

    ``layers`` are counted within ``specs``, whose first is layer ``first`` of the model. ``scopes`` are those of
    `ffattr.decomposition.layer.LayerWeights`, with the prefix of those whose keys are the encoder's tokens, ``encoder_mask``
    ``[B, T']``. ``mask`` ``[B, T]`` and ``tokens`` are the stack's own, ``groups`` what its keys are added up in.
    """

    name: str
    first: int
    specs: tuple[LayerSpec, ...]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[str, ...]
    mask: Tensor
    tokens: list[list[str]]
    encoder_mask: Tensor | None = None
    encoder_tokens: list[list[str]] | None = None
    groups: Groups | None = None

    @property
    def wide(self) -> int:
        """How many scopes take d-wide work for every pair, those of all kinds of keys as one."""
        wide = {*self.specs[0].wide_scopes, self.specs[0].expert_scope}
        return len(wide & {name.removeprefix(CROSS) for name in self.scopes})

    @property
    def by_expert(self) -> bool:
        """Whether any scope is told apart by expert."""
        return any(name.removeprefix(CROSS) == self.specs[0].expert_scope for name in self.scopes)

    def label(self, layer: int) -> str:
        """What messages call a layer of the stack."""
        return f"{self.name} layer {layer}".strip()

    def places(self, layer: int) -> list[int]:
        """Where in the result a layer of the stack goes."""
        return [place for place, asked in enumerate(self.layers) if asked == layer]

    def sequence(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """One batch row without its padding: the positions of its tokens, the wanted queries as indices into those,
        and the rows of the map that these queries fill."""
        mask = self.mask[batch]
        tokens = mask.nonzero()[:, 0]
        queries = torch.tensor(self.queries, device=mask.device, dtype=torch.int64)
        filled = mask[queries].nonzero()[:, 0]
        return tokens, (mask.cumsum(0) - 1)[queries[filled]], filled

    def keys(self, batch: int) -> Tensor | None:
        """The positions of the encoder's tokens of one batch row, where cross-attention reads them."""
        return None if self.encoder_mask is None else self.encoder_mask[batch].nonzero()[:, 0]


@dataclass(frozen=True)
class Request:
    """A model, its inputs and the checked arguments of `ffattr.attribute`.

    ``wide_dtype`` is what the user calls the precision, that of the wide products; all else is in ``dtype``.
    """

    adapted: Adapted
    inputs: Inputs
    stacks: tuple[Stack, ...]
    rule: Rule
    value_bias: str
    dtype: torch.dtype
    wide_dtype: torch.dtype
    device: torch.device
    backend: Backend
    method: str | Sketch
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
        method: str | Sketch = "auto",
        memory_budget: int | None = None,
        keys: Indices = None,
        groups: Any = None,
    ) -> Request:
        """Raises ValueError, TypeError or an `FfattrError` that names the offending value."""
        adapted = resolve(model)
        prepared = prepare(adapted, model, inputs, tokenizer)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}, expected a torch.dtype such as torch.float32, or None")
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget <= 0):
            raise TypeError(f"memory_budget is {memory_budget!r}, expected a positive number of bytes, or None")
        if value_bias not in ("token", "separate"):
            raise ValueError(f"unknown value_bias {value_bias!r}, expected 'token' or 'separate'")
        if dtype == torch.float8_e4m3fn and method == "operator":
            raise ValueError(f"method='operator' does not run in {dtype}; 'direct' is the only one that does")
        wide_dtype, selected = _precision(adapted, dtype, backend)
        if adapted.stacks and (keys is not None or groups is not None):
            raise ValueError("keys= and groups= are for models with one stack of layers, not for encoder and decoder")
        made = groups_of(groups, keys, inputs, tokenizer, prepared.mask, prepared.tokens)
        if groups is not None and method not in ("auto", "direct"):
            raise ValueError(f"method={method!r} is for single tokens; with groups= leave it to 'auto', which is exact")
        stacks = _stacks(adapted, prepared, scopes, layers, queries, made)
        for stack in stacks:
            _check_weights(stack)
        return cls(
            adapted=adapted,
            inputs=prepared,
            stacks=stacks,
            rule=Rule(*ig.rule_of(ig_rule), baseline=_baseline(baseline, stacks)),
            value_bias=value_bias,
            dtype=result_dtype(wide_dtype),
            wide_dtype=wide_dtype,
            device=_home(adapted)[0],
            backend=selected,
            method=method,
            memory_budget=memory_budget,
        )

    @property
    def recorded(self) -> tuple[int, ...]:
        """The layers of the model that any stack asks for."""
        return tuple(stack.first + layer for stack in self.stacks for layer in stack.layers)

    def batches(self) -> list[tuple[list[int], Inputs]]:
        """What the model is run on, one after the other, and which sequences that is."""
        return self.inputs.batches(_TOKENS_AT_ONCE)

    def run(self, inputs: Inputs, on_layer: Callable[[LayerRecord], None], check: bool = True) -> None:
        """Run the model on ``inputs``, all of them or one batch, and hand on what each layer leaves."""
        encoder = None if inputs.encoder is None else inputs.encoder.mask
        record(self.adapted, inputs.kwargs, on_layer, self.recorded, check, inputs.mask, encoder)

    def stack_of(self, layer: int) -> Stack:
        """Whose layer a layer of the model is."""
        return next(stack for stack in self.stacks if stack.first <= layer < stack.first + len(stack.specs))

    def plan(self, stack: Stack, layer: int, weights: LayerWeights, shape: LayerShape) -> LayerPlan:
        """How one layer of a pack of sequences is to be computed; ``weights`` in any dtype."""
        device = weights.out.weight.device  # of several, the one where this layer is
        made = plan_layer(
            layer, shape, stack.wide, self.backend, self.method, self.wide_dtype, device, self.memory_budget
        )
        return replace(made, stack=stack.name)

    def shape(
        self, stack: Stack, layer: int, weights: LayerWeights, batch: int, pairs: int | None = None
    ) -> LayerShape:
        """What the cost of a layer of one sequence depends on; ``pairs``: of its tokens, those that are not masked
        (None: all)."""
        tokens, rows, _ = stack.sequence(batch)
        keys = stack.keys(batch)
        count = len(tokens) + (0 if keys is None or weights.cross is None else len(keys))
        pairs = len(rows) * count if pairs is None else pairs
        shape = LayerShape.of(weights, len(rows), count, pairs, stack.specs[layer].active, scopes=stack.scopes)
        if stack.groups is not None:
            columns = stack.groups.index[batch][tokens]
            columns = columns[columns >= 0]
            share = pairs / max(1, count)
            single = len(columns.unique()) == len(columns)
            found = round(share * len(columns))
            products = found if single else min(round(share * len(columns.unique())), found - 1)
            shape = replace(shape, pairs=found, products=products)
        return replace(shape, by_expert=stack.by_expert and weights.mixture)

    def packs(self, stack: Stack, layer: int, weights: LayerWeights, batch: Sequence[int]) -> list[list[int]]:
        """Which of the sequences ``batch``, by their places in it, are worked on together."""
        shapes, device = [self.shape(stack, layer, weights, row) for row in batch], weights.out.weight.device
        return packs(shapes, stack.wide, self.backend, self.method, self.wide_dtype, device, self.memory_budget)


def _stacks(
    adapted: Adapted,
    inputs: Inputs,
    scopes: str | Sequence[str],
    layers: Indices,
    queries: Indices,
    groups: Groups | None,
) -> tuple[Stack, ...]:
    found = []
    ranges = adapted.stacks or {"": range(len(adapted.layers))}
    specs = {name: tuple(adapted.layers[index] for index in numbers) for name, numbers in ranges.items()}
    for name, of_stack in specs.items():
        if any(spec.scopes != of_stack[0].scopes for spec in of_stack):
            raise ValueError(
                f"the layers of this {name or 'model'} differ in their norms; attribute them one kind at a time"
            )
    for name, asked in scopes_of(scopes, specs).items():
        side = inputs.encoder if name == "encoder" else inputs
        assert side is not None
        what = f"{name} " if name else ""
        found.append(
            Stack(
                name,
                ranges[name].start,
                specs[name],
                indices(f"{what}layers", layers, len(specs[name])),
                indices(f"{what}queries", queries, side.mask.shape[1]),
                asked,
                side.mask,
                side.tokens,
                None if name != "decoder" or inputs.encoder is None else inputs.encoder.mask,
                None if name != "decoder" or inputs.encoder is None else inputs.encoder.tokens,
                groups,
            )
        )
    return tuple(found)


def _precision(adapted: Adapted, dtype: torch.dtype | None, backend: str) -> tuple[torch.dtype, Backend]:
    """The dtype of the wide products and who computes them.

    Where the user names no dtype: a half model's own on a GPU, which is made for it, where the backend has it.
    """
    (device, own), heads = _home(adapted), max(spec.heads for spec in adapted.layers)
    if dtype is None and device.type == "cuda" and own in (torch.bfloat16, torch.float16):
        try:
            return own, backends.select(backend, device, own, heads)
        except BackendUnavailable:
            pass  # it then says below why it cannot run at all, or runs in float32
    dtype = result_dtype(own) if dtype is None else dtype
    return dtype, backends.select(backend, device, dtype, heads)


def _home(adapted: Adapted) -> tuple[torch.device, torch.dtype]:
    """Where the model is computed and in which dtype: those of its first parameter that is not packed into integers."""
    parameter = next(one for one in adapted.base.parameters() if one.dtype.is_floating_point)
    if parameter.device.type != "meta":
        return parameter.device, parameter.dtype
    return read_linear(adapted.layers[0].out, None).weight.device, parameter.dtype  # offloaded


def _check_weights(stack: Stack) -> None:
    """Before the forward pass, so that a weight which is no number is named, not the activation that it spoils."""
    for layer in sorted(set(stack.layers)):
        weights = stack.specs[layer].weights(None)
        for name, tensor in weights.tensors():
            if tensor.device != weights.out.weight.device:
                raise UnsupportedModel(
                    f"{stack.label(layer)}: {name} is on {tensor.device}, but out.weight on "
                    f"{weights.out.weight.device}; expected each layer whole on one device (accelerate's "
                    "no_split_module_classes)"
                )
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{stack.label(layer)}: {name} has entries that are NaN or infinite")


def _baseline(baseline: str | Tensor, stacks: Sequence[Stack]) -> str | Tensor:
    if isinstance(baseline, str):
        if baseline not in ("zero", "bias"):
            raise ValueError(f"unknown baseline {baseline!r}, expected 'zero', 'bias' or a tensor [F]")
        return baseline
    if not isinstance(baseline, Tensor):
        raise TypeError(f"baseline is {baseline!r}, expected 'zero', 'bias' or a tensor [F]")
    several = len(stacks) > 1 or any(spec.experts is not None for stack in stacks for spec in stack.specs)
    for stack in stacks:
        for layer in sorted(set(stack.layers)):
            spec = stack.specs[layer]
            width, gated = spec.weights(None).ff_width, spec.gate is not None
            if list(baseline.shape) not in ([width], [2, width] if gated else [width]):
                expected = f"[{width}]" + (f" (gate, with up at zero) or [2, {width}] (gate and up)" if gated else "")
                where = f" in {stack.label(layer)}" if several else ""
                raise ValueError(f"baseline has shape {list(baseline.shape)}, expected {expected}{where}")
    if not torch.isfinite(baseline).all():
        raise ValueError("baseline has entries that are NaN or infinite")
    return baseline
