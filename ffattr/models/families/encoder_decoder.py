"""Models with an encoder and a decoder, whose layers also attend to the encoder's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .schema import EncoderDecoder, Family

__all__ = ["ENCODER_DECODERS"]

_BART_LAYER = Family(
    layers="encoder.layers",
    attention="self_attn",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    activation="activation_fn",
    norm_after_attn="self_attn_layer_norm",
    norm_after_ff="final_layer_norm",
    positions="encoder.embed_positions",
    heads="encoder_attention_heads",
)
BART = EncoderDecoder(
    _BART_LAYER,
    replace(
        _BART_LAYER,
        layers="decoder.layers",
        positions="decoder.embed_positions",
        heads="decoder_attention_heads",
        cross_attention="encoder_attn",
        cross_value="encoder_attn.v_proj",
        cross_out="encoder_attn.out_proj",
        norm_after_cross="encoder_attn_layer_norm",
    ),
)


def _move_norms_before(family: Family) -> Family:
    """Returns the same layer with its norms before the blocks."""
    return replace(
        family,
        norm_before_attn=family.norm_after_attn,
        norm_after_attn=None,
        norm_before_ff=family.norm_after_ff,
        norm_after_ff=None,
        norm_after_cross=None,
    )


MBART = EncoderDecoder(_move_norms_before(BART.encoder), _move_norms_before(BART.decoder))
WHISPER = replace(MBART, encoder=replace(MBART.encoder, positions=None))
M2M100 = replace(WHISPER, decoder=replace(MBART.decoder, positions=None))  # computes its positions

_T5_LAYER = Family(
    layers="encoder.block",
    attention="layer.0.SelfAttention",
    value="layer.0.SelfAttention.v",
    out="layer.0.SelfAttention.o",
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    activation="layer.1.DenseReluDense.act",
    norm_before_attn="layer.0.layer_norm",
    norm_before_ff="layer.1.layer_norm",
)


def _choose_t5(config: Any) -> EncoderDecoder:
    encoder = _T5_LAYER
    if config.is_gated_act:
        encoder = replace(encoder, gate="layer.1.DenseReluDense.wi_0", up="layer.1.DenseReluDense.wi_1")
    block = {
        part: getattr(encoder, part).replace("layer.1.", "layer.2.")
        for part in ("gate", "up", "down", "activation", "norm_before_ff")
        if getattr(encoder, part) is not None
    }
    decoder = replace(
        encoder,
        layers="decoder.block",
        cross_attention="layer.1.EncDecAttention",
        cross_value="layer.1.EncDecAttention.v",
        cross_out="layer.1.EncDecAttention.o",
        **block,
    )
    return EncoderDecoder(encoder, decoder)


#: ``config.model_type`` to its two families, or to the choice of them by configuration.
ENCODER_DECODERS: Mapping[str, EncoderDecoder | Callable[[Any], EncoderDecoder]] = MappingProxyType(
    {
        "bart": BART,
        "blenderbot": MBART,
        "blenderbot-small": BART,
        "m2m_100": M2M100,
        "marian": BART,
        "mbart": MBART,
        "mt5": _choose_t5,
        "pegasus": MBART,
        "plbart": BART,
        "t5": _choose_t5,
        "umt5": _choose_t5,
        "whisper": WHISPER,
    }
)
