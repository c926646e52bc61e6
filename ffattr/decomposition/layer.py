"""One layer's parameters: the only thing that the formulas see of a model.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .affine import Linear, Norm
from .clamp import Clamp
from .routing import Routing
from .scopes import CROSS, Point, Scoped, Source

__all__ = ["Block", "Branch", "CrossWeights", "Edit", "Latent", "LayerWeights", "edit_weights"]


@dataclass(frozen=True)
class Branch:
    """One of the feed-forward networks whose outputs a layer adds up: most layers have a single one.

    ``gate`` is None in a dense network; a gated one computes ``activation(t @ gate) * (t @ up)``. ``clamp`` says how
    gate and up are cut off before they meet (gpt-oss).

    A *routed* branch is a mixture of experts: ``up``, ``gate`` and ``down`` hold all of them, ``[E, in, out]``, in the
    model's own dtype; `expert` is one of them as a dense branch. A token's shares multiply what its experts return or,
    with ``scales_input``, what they read (Llama 4).

    Beside a mixture, a *shared* branch is one that all tokens go through. Where it is ``weighed``, each token
    multiplies what it returns by a number of its own, `Routing.gain` (Qwen2-MoE).
    """

    up: Linear
    gate: Linear | None
    down: Linear
    activation: Activation
    clamp: Clamp | None = None
    scales_input: bool = False
    weighed: bool = False

    @property
    def routed(self) -> bool:
        """Whether a router sends each token to some of several experts."""
        return self.down.weight.dim() == 3

    @property
    def projections(self) -> tuple[Linear, ...]:
        """What makes the pre-activations: up alone, or gate and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def width(self) -> int:
        """``F``, of one expert in a mixture."""
        return self.down.weight.shape[-2]

    def expert(self, number: int, dtype: torch.dtype) -> Branch:
        """One expert of a mixture, in ``dtype``."""
        return replace(
            self,
            up=self.up.of_expert(number, dtype),
            gate=None if self.gate is None else self.gate.of_expert(number, dtype),
            down=self.down.of_expert(number, dtype),
        )


@dataclass(frozen=True)
class Block:
    """A dense feed-forward network, and which of ``n`` tokens go through it.

    ``place`` is that of its branch in the layer. Of a mixture, it is the expert ``number``: the tokens ``tokens``
    ``[m]`` go to it, of which it is choice ``slots`` ``[m]`` and which multiply what it returns (or reads, see
    `Branch`) by ``share`` ``[m]``. All three are None where all tokens go through it, but for the ``share`` ``[n]`` of
    a branch that is weighed.
    """

    place: int
    branch: Branch
    number: int | None = None
    tokens: Tensor | None = None
    slots: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True)
class Latent:
    """What a value projection reads that does not read the layer's input itself: ``norm(x @ down)``, narrower than
    the model (multi-head latent attention). The statistics of its norm are frozen like those of any other."""

    down: Linear
    norm: Norm


@dataclass(frozen=True)
class CrossWeights:
    """Attention to the tokens of an encoder, between self-attention and the feed-forward block of a decoder layer.

    A norm before it shapes the attention weights alone and is no part of this.
    """

    heads: int
    kv_heads: int
    value: Linear
    out: Linear
    latent: None = None
    norm_before_attn: None = None
    norm_of_attn: Norm | None = None
    norm_after_attn: Norm | None = None
    head_features: int = 1


@dataclass(frozen=True)
class LayerWeights(Scoped):
    """One layer's parameters in one dtype, on one device.

    A norm that the layer does not have is None. Post-LN (BERT) has ``norm_after_attn`` and ``norm_after_ff`` (both act
    on the sum with the residual); pre-LN (GPT-2, Llama) has ``norm_before_attn`` and ``norm_before_ff``.
    ``norm_of_attn`` and ``norm_of_ff`` act on what a block returns, before the residual is added (Gemma 2, OLMo 2).
    The feed-forward block is the sum of its ``branches``.
    ``parallel``: the feed-forward block reads the layer's input beside attention, not its output (GPT-NeoX).
    ``cross``: attention to an encoder's tokens. ``latent``: what lies before ``value`` (DeepSeek).

    Where a gate multiplies every feature that a head returns, each is mixed by weights of its own: ``heads`` then
    counts features, of which ``head_features`` stand together for one of the model's heads.
    """

    heads: int
    kv_heads: int
    value: Linear
    out: Linear
    branches: tuple[Branch, ...]
    norm_before_attn: Norm | None = None
    norm_of_attn: Norm | None = None
    norm_after_attn: Norm | None = None
    norm_before_ff: Norm | None = None
    norm_of_ff: Norm | None = None
    norm_after_ff: Norm | None = None
    parallel: bool = False
    cross: CrossWeights | None = None
    latent: Latent | None = None
    head_features: int = 1

    @property
    def attentions(self) -> tuple[tuple[Source, LayerWeights | CrossWeights], ...]:
        """Every attention in the order in which it runs: to the layer's own tokens, then to an encoder's."""
        own: tuple[Source, LayerWeights | CrossWeights] = ("own", self)
        return (own,) if self.cross is None else (own, ("cross", self.cross))

    def norms_before(self, point: Point, source: Source = "own") -> tuple[Norm, ...]:
        """The norms, one after the other, that what an attention reads passes on its way to a point of the residual
        stream before the feed-forward block. A norm of what attention returns is not among them.
        """
        own = () if source == "cross" else (self.norm_after_attn,)
        cross = () if self.cross is None else (self.cross.norm_after_attn,)  # passed by the own tokens' vectors, too
        passed = {"attn": (), "attn_res": (), "atb": (*own, *cross), "ff_input": (*own, *cross, self.norm_before_ff)}
        return tuple(norm for norm in passed[point] if norm is not None)

    @property
    def mixture(self) -> bool:
        """Whether any branch of the feed-forward block is a mixture of experts."""
        return any(branch.routed for branch in self.branches)

    @property
    def shared(self) -> int:
        """How many branches all tokens go through beside a mixture; 0 where there is none."""
        return sum(not branch.routed for branch in self.branches) if self.mixture else 0

    @property
    def streams(self) -> int:
        """How many pre-activations a neuron has, ``S``: 1 in a dense network, gate and up in a gated one."""
        return len(self.branches[0].projections)

    @property
    def width(self) -> int:
        return self.out.weight.shape[1]

    @property
    def head_dim(self) -> int:
        return self.out.weight.shape[0] // self.heads

    def count_neurons(self, experts: int) -> int:
        """How many neurons a token goes through that goes to so many experts of a mixture."""
        return sum(branch.width * (experts if branch.routed else 1) for branch in self.branches)

    def blocks(self, routing: Routing | None) -> Iterator[Block]:
        """The dense networks that any of the tokens of ``routing`` goes through; None: none is routed."""
        for place, branch in enumerate(self.branches):
            if not branch.routed:
                gain = routing.gain if branch.weighed and routing is not None else None
                yield Block(place, branch, share=None if gain is None else gain.to(self.out.weight.dtype))
                continue
            assert routing is not None
            for number, tokens, slots in routing.by_expert():
                share = routing.weight[tokens, slots].to(self.out.weight.dtype)
                yield Block(place, branch.expert(number, self.out.weight.dtype), number, tokens, slots, share)

    def map_parameters(self, convert: Callable[[Linear | Norm], Linear | Norm]) -> LayerWeights:
        """The layer with every projection and norm replaced by what ``convert`` makes of it."""

        def convert_all(owner: Any) -> Any:
            parts = {field.name: getattr(owner, field.name) for field in fields(owner)}
            found = {name: convert(part) for name, part in parts.items() if isinstance(part, Linear | Norm)}
            return replace(owner, **found)

        branches = tuple(convert_all(branch) for branch in self.branches)
        cross = None if self.cross is None else convert_all(self.cross)
        latent = None if self.latent is None else convert_all(self.latent)
        found: LayerWeights = replace(convert_all(self), branches=branches, cross=cross, latent=latent)
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a readable name, for instance ``("norm_before_ff.weight", ...)``."""
        yield from _named_tensors(self, "")
        if self.cross is not None:
            yield from _named_tensors(self.cross, CROSS)
        if self.latent is not None:
            yield from _named_tensors(self.latent, "latent.")


def _named_tensors(owner: LayerWeights | CrossWeights | Latent | Branch, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for field in fields(owner):
        part = getattr(owner, field.name)
        if isinstance(part, Linear | Norm):
            for name in ("weight", "bias"):
                tensor = getattr(part, name)
                if tensor is not None:
                    yield f"{prefix}{field.name}.{name}", tensor
        elif field.name == "branches":
            for place, branch in enumerate(part):
                yield from _named_tensors(branch, f"branch {place}: " if len(part) > 1 else prefix)


@dataclass(frozen=True)
class Edit:
    """A ``part`` of a layer, by its name there, returns ``factor * y + constant``, both ``[features]``; where it
    ``reads`` them, what it is given is changed so, and not what it returns.

    ``up``, ``gate``, ``down`` and ``activation`` are those of the first branch; ``cross.`` names parts of the attention
    to an encoder. ``factor`` is None where nothing is multiplied. ``removed`` ``[k, features]`` are orthonormal
    directions in which nothing of ``y`` is left: ``y - y removed^T removed + constant``.
    """

    part: str
    constant: Tensor
    factor: Tensor | None = None
    reads: bool = False
    removed: Tensor | None = None


def edit_weights(weights: LayerWeights, edits: Sequence[Edit]) -> LayerWeights:
    """Returns the weights of a layer with all ``edits``, one after the other.

    Raises ValueError where what an activation returns is multiplied, so that no constant stays one.
    """
    like = weights.out.weight
    for edit in edits:
        branch, cross = weights.branches[0], weights.cross
        if edit.removed is not None and edit.part == "norm_before_attn":
            weights = _edit_values_read(weights, edit)
            continue
        if edit.part == "activation":
            if (branch.gate is not None or branch.routed) and bool(edit.constant.any()):
                raise ValueError("a constant is added to a gate, which multiplies it: it is none of the block's output")
            branch = replace(branch, down=_edit_input(branch.down, edit))
        elif edit.part in ("up", "gate", "down"):
            branch = replace(branch, **{edit.part: _edit_part(getattr(branch, edit.part), edit, like)})
        elif cross is not None and edit.part.startswith("cross."):
            name = edit.part.removeprefix("cross.")
            cross = replace(cross, **{name: _edit_part(getattr(cross, name), edit, like)})
        else:
            weights = replace(weights, **{edit.part: _edit_part(getattr(weights, edit.part), edit, like)})
        weights = replace(weights, branches=(branch, *weights.branches[1:]), cross=cross)
    return weights


def _edit_values_read(weights: LayerWeights, edit: Edit) -> LayerWeights:
    """Returns weights in which values read the norm before attention changed: a norm acts on each feature alone."""
    if weights.latent is not None:
        return replace(weights, latent=replace(weights.latent, down=_edit_input(weights.latent.down, edit)))
    return replace(weights, value=_edit_input(weights.value, edit))


def _edit_part(part: Any, edit: Edit, like: Tensor) -> Any:
    if edit.reads:
        return _edit_input(part, edit)
    constant, weight, bias = edit.constant.to(like), part.weight, part.bias
    if edit.removed is not None:
        weight = _remove_directions(weight, edit.removed)
        bias = None if bias is None else _remove_directions(bias, edit.removed)
    if edit.factor is not None:
        factor = edit.factor.to(like)
        weight = factor if weight is None else weight * factor
        bias = None if bias is None else bias * factor
    return replace(part, weight=weight, bias=constant if bias is None else bias + constant)


def _edit_input(part: Linear, edit: Edit) -> Linear:
    weight, added = part.weight, edit.constant.to(part.weight) @ part.weight
    if edit.removed is not None:
        weight = _remove_directions(weight.mT, edit.removed).mT
    if edit.factor is not None:
        weight = edit.factor.to(weight)[:, None] * weight
    return Linear(weight, added if part.bias is None else part.bias + added)


def _remove_directions(rows: Tensor, directions: Tensor) -> Tensor:
    """``rows`` ``[..., features]`` of which nothing is left in orthonormal ``directions`` ``[k, features]``."""
    directions = directions.to(rows)
    return rows - (rows @ directions.mT) @ directions
