"""What a user asks for, checked against the model once, so that everything after can rely on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..decomposition import integrated_gradients as ig
from ..decomposition.attention import LayerRecord
from ..decomposition.layer import LayerWeights
from ..decomposition.precision import result_dtype
from ..decomposition.reference import Rule
from ..engine.key_tokens import Recall, make_anew
from ..engine.planning.choose import group_into_packs, plan_layer
from ..engine.planning.costs import LayerShape
from ..engine.planning.plan import EngineOptions, LayerPlan
from ..errors import BackendUnavailable
from ..models.capture.recorder import record_layers
from ..models.inputs.given import read_given
from ..models.inputs.groups import make_groups
from ..models.inputs.prepare import Inputs, prepare_inputs
from ..models.registry import ModelDescription, resolve
from ..models.spec.weights import read_linear
from ..ops import backends
from .kept_matrices import recall_with
from .options import Options
from .read_weights import ReadWeights, read_weights
from .stack import Stack, build_stacks

__all__ = ["Request"]

_TOKENS_AT_ONCE = 4096
"""How many tokens, padding included, the model reads at once of texts that are cut into batches: beyond this it runs no
faster, and what is recorded of a layer (a few dozen numbers for each of its widths) stays small."""


@dataclass(frozen=True)
class Request:
    """A model, its inputs and the checked options of `ffattr.attribute`.

    ``engine.matmul_dtype`` is what the user calls the precision, that of the feed-forward products; all else is in
    ``dtype``. ``engine.device`` is where the model's first layer is. ``read``: weights of layers that
    need no other copy. ``name`` is what the model is called.
    """

    description: ModelDescription
    inputs: Inputs
    stacks: tuple[Stack, ...]
    rule: Rule
    options: Options
    dtype: torch.dtype
    engine: EngineOptions
    read: Mapping[int, ReadWeights] = field(default_factory=dict, repr=False)
    name: str = ""

    @classmethod
    def from_options(cls, model: nn.Module, inputs: Any, tokenizer: Any, options: Options) -> Request:
        """Raises ValueError, TypeError or an `FfattrError` that names the offending value."""
        if tokenizer is not None and not callable(tokenizer):
            raise TypeError(f"tokenizer is {tokenizer!r}, expected a transformers tokenizer or None")
        description = resolve(model, lambda base: read_given(base, model, inputs, tokenizer))
        prepared = prepare_inputs(description, model, inputs, tokenizer)
        options.check()
        engine = _choose_engine(description, options)
        if description.stacks and (options.keys is not None or options.groups is not None):
            raise ValueError("keys= and groups= are for models with one stack of layers, not for encoder and decoder")
        known = (prepared.mask, prepared.tokens, prepared.labels)
        groups = make_groups(options.groups, options.keys, inputs, tokenizer, *known)
        if options.groups is not None and options.method not in ("auto", "direct"):
            raise ValueError(
                f"method={options.method!r} is for single tokens; with groups= leave it to 'auto', which is exact"
            )
        stacks = build_stacks(description, prepared, options, groups)
        read = {number: found for stack in stacks for number, found in read_weights(stack).items()}
        rule = Rule(*ig.rule_of(options.ig), baseline=_check_baseline(options.baseline, stacks))
        if options.toward is not None:
            _check_direction(options.toward, stacks)
        return cls(
            description,
            prepared,
            stacks,
            rule,
            options,
            result_dtype(engine.matmul_dtype),
            engine,
            read,
            _name_model(model),
        )

    @property
    def recorded(self) -> tuple[int, ...]:
        """The layers of the model that any stack asks for."""
        return tuple(stack.first + layer for stack in self.stacks for layer in stack.layers)

    def describe_arguments(self) -> dict[str, str]:
        """Returns what a result says of how it was computed."""
        options, baseline = self.options, self.options.baseline
        return {
            "model": self.description.family,
            "name": self.name,
            "ig": str(options.ig),
            "baseline": baseline if isinstance(baseline, str) else f"tensor {list(baseline.shape)}",
            "value_bias": options.value_bias,
            "dtype": str(self.engine.matmul_dtype).removeprefix("torch."),
            "backend": self.engine.backend.name,
            "ffattr": __version__,
            "torch": str(torch.__version__),
        }

    def batches(self) -> list[tuple[list[int], Inputs]]:
        """What the model is run on, one after the other, and which sequences that is."""
        return self.inputs.split_batches(_TOKENS_AT_ONCE)

    def run_model(
        self,
        inputs: Inputs,
        on_layer: Callable[[LayerRecord], None],
        check: bool = True,
        model: nn.Module | None = None,
        layers: Sequence[int] | None = None,
    ) -> Any:
        """Run the model on ``inputs``, all of them or one batch, and hand on what each layer leaves.

        ``model`` runs instead of the base without a head; ``layers`` of the model are recorded, None: all that any
        stack asks for. Returns what the model returned.
        """
        encoder, layers = None if inputs.encoder is None else inputs.encoder.mask, layers or self.recorded
        return record_layers(self.description, inputs.kwargs, on_layer, layers, check, inputs.mask, encoder, model)

    def weights_of_layer(self, stack: Stack, layer: int) -> LayerWeights:
        """The weights of a layer of a stack in ``dtype``."""
        read = self.read.get(stack.first + layer)
        return (
            read.weights if read is not None and read.of_dtype(self.dtype) else stack.specs[layer].weights(self.dtype)
        )

    def recall_of_layer(self, stack: Stack, layer: int, as_read: bool = True) -> Recall:
        """Says where matrices come from that depend on those weights alone, ``as_read``. Whoever bounds the memory has
        nothing kept."""
        number = stack.first + layer
        read = self.read.get(number) if as_read else None
        if read is None or not read.of_dtype(self.dtype) or self.options.memory_budget is not None:
            return make_anew
        return recall_with(self.description.base, number, stack.specs[layer].module, read)

    def stack_of_layer(self, layer: int) -> Stack:
        """Whose layer a layer of the model is."""
        return next(stack for stack in self.stacks if stack.first <= layer < stack.first + len(stack.specs))

    def plan_layer(self, stack: Stack, layer: int, weights: LayerWeights, shape: LayerShape) -> LayerPlan:
        """How one layer of a pack of sequences is to be computed; ``weights`` in any dtype."""
        engine = self._engine_at(weights)
        key = (stack.name, shape, engine.device)
        if key not in self._plans:  # layers of a stack are mostly alike
            self._plans[key] = plan_layer(layer, shape, stack.ff_scopes, engine)
        return replace(self._plans[key], layer=stack.number_layer(layer), stack=stack.name)

    @cached_property
    def _plans(self) -> dict[object, LayerPlan]:
        return {}

    @cached_property
    def _shapes(self) -> dict[object, LayerShape]:
        return {}

    @cached_property
    def _packs(self) -> dict[object, list[list[int]]]:
        return {}

    def _engine_at(self, weights: LayerWeights) -> EngineOptions:
        """The options on the device of a layer: a model may lie on several."""
        device = weights.out.weight.device
        return self.engine if device == self.engine.device else replace(self.engine, device=device)

    def shape_of_layer(
        self, stack: Stack, layer: int, weights: LayerWeights, batch: int, pairs: int | None = None
    ) -> LayerShape:
        """What the cost of a layer of one sequence depends on; ``pairs``: of its tokens, those that are not masked
        (None: all)."""
        tokens, queries, _ = stack.index_sequence(batch)
        keys = stack.encoder_positions(batch)
        count = len(tokens) + (0 if keys is None or weights.cross is None else len(keys))
        pairs = len(queries) * count if pairs is None else pairs
        experts = stack.specs[layer].active
        sizes = (weights.width, weights.heads, weights.head_dim, weights.streams, weights.count_neurons(experts))
        key = (stack.name, weights.mixture, sizes, len(queries), count, pairs)
        if key not in self._shapes:
            given = (weights, len(queries), count, pairs, experts)
            found = LayerShape.from_weights(
                *given, scopes=stack.scopes, reduction=self.options.reduce, rounded=self.engine.backend.rounded
            )
            self._shapes[key] = replace(found, by_expert=stack.by_expert and weights.mixture)
        shape = self._shapes[key]
        if stack.groups is not None:
            columns = stack.groups.index[batch][tokens]
            columns = columns[columns >= 0]
            share = pairs / max(1, count)
            single = len(columns.unique()) == len(columns)
            kept = round(share * len(columns))
            group_pairs = kept if single else min(round(share * len(columns.unique())), kept - 1)
            shape = replace(shape, pairs=kept, group_pairs=group_pairs)
        return shape

    def group_into_packs(
        self, stack: Stack, layer: int, weights: LayerWeights, batch: Sequence[int]
    ) -> list[list[int]]:
        """Which of the sequences ``batch``, by their places in it, are worked on together."""
        shapes = tuple(self.shape_of_layer(stack, layer, weights, row) for row in batch)
        engine = self._engine_at(weights)
        key = (stack.name, shapes, engine.device)
        if key not in self._packs:
            self._packs[key] = group_into_packs(shapes, stack.ff_scopes, engine)
        return self._packs[key]


def _name_model(model: nn.Module) -> str:
    """Returns the name by which a model was loaded, of a folder the last two of its parts; else that of its class."""
    given = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    if given and (Path(given).is_absolute() or Path(given).is_dir()):
        return "/".join(Path(given).absolute().parts[-2:])
    return given or type(model).__name__


def _choose_engine(description: ModelDescription, options: Options) -> EngineOptions:
    """Who computes, where, and in which precision.

    Where the user names no dtype: a half model's own on a GPU, which is made for it, where the backend has it.
    """
    (device, own), heads = _locate_model(description), max(spec.mixed_heads for spec in description.layers)
    dtype, selected = options.dtype, None
    if dtype is None and device.type == "cuda" and own in (torch.bfloat16, torch.float16):
        try:
            dtype, selected = own, backends.select_backend(options.backend, device, own, heads, options.reduce)
        except BackendUnavailable:
            dtype = None  # it then says below why it cannot run at all, or runs in float32
    if selected is None:
        dtype = result_dtype(own) if dtype is None else dtype
        selected = backends.select_backend(options.backend, device, dtype, heads, options.reduce)
    assert dtype is not None
    return EngineOptions(selected, options.method, dtype, device, options.memory_budget)


def _locate_model(description: ModelDescription) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype in which the model is computed: those of its first parameter that is not packed
    into integers."""
    parameter = next(one for one in description.base.parameters() if one.dtype.is_floating_point)
    if parameter.device.type != "meta":
        return parameter.device, parameter.dtype
    return read_linear(description.layers[0].out, None).weight.device, parameter.dtype  # offloaded


def _check_baseline(baseline: str | Tensor, stacks: Sequence[Stack]) -> str | Tensor:
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
            branches, gated = spec.weights(None).branches, spec.gate is not None
            width = branches[0].width
            if any(branch.width != width for branch in branches):
                raise ValueError(
                    f"baseline is a tensor, but {stack.label_layer(layer)} has experts of {width} neurons and a shared "
                    f"one of {branches[-1].width}; expected 'zero' or 'bias'"
                )
            if list(baseline.shape) not in ([width], [2, width] if gated else [width]):
                expected = f"[{width}]" + (f" (gate, with up at zero) or [2, {width}] (gate and up)" if gated else "")
                where = f" in {stack.label_layer(layer)}" if several else ""
                raise ValueError(f"baseline has shape {list(baseline.shape)}, expected {expected}{where}")
    if not torch.isfinite(baseline).all():
        raise ValueError("baseline has entries that are NaN or infinite")
    return baseline


def _check_direction(direction: Tensor, stacks: Sequence[Stack]) -> None:
    """Raises ValueError where a direction does not read the streams of all scopes."""
    for stack in stacks:
        width = stack.specs[0].weights(None).width
        if len(direction) != width:
            raise ValueError(
                f"toward has {len(direction)} entries, but {stack.name or 'the model'}'s streams have {width}"
            )
        if stack.by_expert:
            raise ValueError("toward= is not for scopes that are told apart by expert; ask for the summed ones")
