"""What the data of a model family says: where in the module tree each part of a layer lives."""

from __future__ import annotations

from dataclasses import dataclass

from ...decomposition.activations import Activation
from ...decomposition.clamp import Clamp

__all__ = ["EncoderDecoder", "Family", "Fused", "PerExpert", "Shared"]


@dataclass(frozen=True)
class Fused:
    """Part ``index`` of ``count`` equal parts of the output of one projection, or of each of its ``groups``.

    ``bias`` is the path of a bias that is added to the part.
    """

    path: str
    index: int
    count: int
    groups: int = 1
    bias: str | None = None


@dataclass(frozen=True)
class PerExpert:
    """Part ``index`` of ``count`` of what the parameter ``weight`` of a module of experts makes, and its ``bias``.

    Parts lie one after the other or, ``alternating``, every output feature belongs to the next part. ``out_last``: the
    weight is ``[E, in, out]``, not ``[E, out, in]``.
    """

    weight: str
    bias: str | None = None
    index: int = 0
    count: int = 1
    alternating: bool = False
    out_last: bool = False


@dataclass(frozen=True)
class Shared:
    """The parts of a network beside a mixture of experts that all tokens go through, as of `Family`; ``weigher`` gives
    the number whose sigmoid its output is multiplied by."""

    gate: str | Fused | None
    up: str | Fused
    down: str
    activation: str | Activation
    weigher: str | None = None


@dataclass(frozen=True)
class Family:
    """Dotted paths: ``layers`` and ``positions`` (a learned position table) from the base model, the rest per layer.

    ``layers`` is a list of them, or a path of each in the order in which they run. ``scale_of_attn`` and
    ``scale_of_ff`` are the factors of what a block returns (LayerScale). ``special_tokens`` come before an image's
    patches. ``kv_heads`` are the key/value heads, where ``num_key_value_heads`` of the configuration does not say it;
    ``heads`` is the configuration's name for the query heads.

    ``experts`` is the module of a mixture's experts, which is called with the tokens, their experts and their weights,
    or else ``router`` returns a number for each of them; ``active`` is the configuration's name for how many a token
    goes to. ``shared`` is a network beside them, where a layer has one. ``dense`` is what a layer without experts is
    like. ``latent`` and ``norm_of_latent`` lie before ``value``, and ``latent_width`` is the configuration's name for
    how many features of the first are read. ``cross_attention`` and so on: attention to an encoder. ``older`` is what
    a layer that has nothing at ``out`` is like, in older versions of transformers.
    """

    layers: str | tuple[str, ...]
    attention: str
    value: str | Fused
    out: str
    up: str | Fused | PerExpert
    down: str | PerExpert
    activation: str | Activation
    gate: str | Fused | PerExpert | None = None
    norm_before_attn: str | None = None
    norm_of_attn: str | None = None
    norm_after_attn: str | None = None
    norm_before_ff: str | None = None
    norm_of_ff: str | None = None
    norm_after_ff: str | None = None
    norm_of_values: str | None = None
    scale_of_attn: str | None = None
    scale_of_ff: str | None = None
    positions: str | None = None
    special_tokens: tuple[str, ...] = ()
    parallel: bool = False
    kv_heads: int | None = None
    heads: str = "num_attention_heads"
    experts: str | None = None
    dense: Family | None = None
    clamp: Clamp | None = None
    router: str | None = None
    scales_input: bool = False
    active: str = "num_experts_per_tok"
    shared: Shared | None = None
    latent: str | None = None
    norm_of_latent: str | None = None
    latent_width: str = "kv_lora_rank"
    cross_attention: str | None = None
    cross_value: str | None = None
    cross_out: str | None = None
    norm_after_cross: str | None = None
    older: Family | None = None


@dataclass(frozen=True)
class EncoderDecoder:
    """Two stacks of layers in one model."""

    encoder: Family
    decoder: Family
