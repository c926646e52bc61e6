"""PyTorch's own ``nn.Transformer``, ``nn.TransformerDecoder`` and ``nn.TransformerDecoderLayer``."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModel
from .spec.described import ModelDescription
from .spec.layer import CrossSpec, LayerSpec
from .torch_encoder import describe_encoder, find_values, make_layer_spec, require_plain_attention

__all__ = ["KINDS", "NAMES", "describe_with_memory"]

KINDS = (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
NAMES = tuple(kind.__name__ for kind in KINDS)


def describe_with_memory(
    model: nn.Transformer | nn.TransformerDecoder | nn.TransformerDecoderLayer,
) -> ModelDescription | None:
    """Describes layers that attend to their own tokens and to a memory: alone, or with the encoder that makes it.

    Returns None for an ``nn.Transformer`` with an encoder or decoder of another class. Raises `UnsupportedModel`.
    """
    name = type(model).__name__
    decoder = model.decoder if isinstance(model, nn.Transformer) else model
    if not isinstance(decoder, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
        return None
    modules = [decoder] if isinstance(decoder, nn.TransformerDecoderLayer) else list(decoder.layers)
    layers = tuple(_make_spec(getattr(module, "_orig_mod", module)) for module in modules)
    if not layers:
        raise UnsupportedModel("the nn.TransformerDecoder has no layers")
    batch_first = bool(layers[0].attention.batch_first)
    if not isinstance(model, nn.Transformer):
        return ModelDescription(model, layers, name, batch_first, stacks={"decoder": range(len(layers))}, learned=True)
    if not isinstance(model.encoder, nn.TransformerEncoder):
        return None
    encoder, encoder_first = describe_encoder(model.encoder)
    if encoder_first != batch_first:
        raise UnsupportedModel("the encoder of the nn.Transformer and its decoder differ in batch_first")
    stacks = {"encoder": range(len(encoder)), "decoder": range(len(encoder), len(encoder) + len(layers))}
    return ModelDescription(model, encoder + layers, name, batch_first, stacks=stacks, learned=True)


def _make_spec(layer: nn.Module) -> LayerSpec:
    if not isinstance(layer, nn.TransformerDecoderLayer):
        raise UnsupportedModel(
            f"a layer of the nn.TransformerDecoder is a {type(layer).__name__}, expected nn.TransformerDecoderLayer. "
            "Describe its layers with ffattr.register_adapter."
        )
    own, across = (require_plain_attention(attention) for attention in (layer.self_attn, layer.multihead_attn))
    norms = (layer.norm1, layer.norm2, layer.norm3)
    # Before cross-attention a norm acts on the queries alone, whose attention weights are recorded.
    before, after = (norms, (None, None, None))[:: 1 if layer.norm_first else -1]
    cross = CrossSpec(
        attention=across,
        heads=across.num_heads,
        kv_heads=across.num_heads,
        value=find_values(across),
        out=across.out_proj,
        norm_after_attn=after[1],
    )
    return make_layer_spec(layer, own, before, after, cross)
