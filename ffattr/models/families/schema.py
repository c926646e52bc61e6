"""What the data of a model family says: where in the module tree each part of a layer lives."""

from __future__ import annotations

from dataclasses import dataclass

from ...decomposition.activations import Activation
from ...decomposition.clamp import Clamp

__all__ = ["EncoderDecoder", "Family", "Fused", "PerExpert"]


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
class Family:
    """Dotted paths: ``layers`` and ``positions`` (a learned position table) from the base model, the rest per layer.

    ``layers`` is a list of them, or a path of each in the order in which they run. ``scale_of_attn`` and
    ``scale_of_ff`` are the factors of what a block returns (LayerScale). ``special_tokens`` come before an image's
    patches. ``kv_heads`` are the key/value heads, where ``num_key_value_heads`` of the configuration does not say it;
    ``heads`` is the configuration's name for the query heads.

    ``experts`` is the module of a mixture's experts, which is called with the tokens, their experts and their weights;
    ``dense`` what a layer without it is like. ``cross_attention`` and so on: attention to an encoder. ``older`` is what
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
