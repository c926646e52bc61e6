"""PyTorch's own ``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer``."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModel
from .spec.layer import CrossSpec, LayerSpec
from .spec.weights import Columns

__all__ = ["NAMES", "describe_encoder", "find_values", "make_layer_spec", "require_plain_attention"]

NAMES = ("TransformerEncoder", "TransformerEncoderLayer")


def describe_encoder(model: nn.TransformerEncoder | nn.TransformerEncoderLayer) -> tuple[tuple[LayerSpec, ...], bool]:
    """Describes the layers of an encoder, or of one layer on its own, and whether it takes ``[batch, T, d]``."""
    modules = [model] if isinstance(model, nn.TransformerEncoderLayer) else list(model.layers)
    layers = tuple(_make_spec(getattr(module, "_orig_mod", module)) for module in modules)
    if not layers:
        raise UnsupportedModel("the nn.TransformerEncoder has no layers")
    attention = layers[0].attention
    assert isinstance(attention, nn.MultiheadAttention)
    return layers, bool(attention.batch_first)


def _make_spec(layer: nn.Module) -> LayerSpec:
    if not isinstance(layer, nn.TransformerEncoderLayer):
        raise UnsupportedModel(
            f"a layer of the nn.TransformerEncoder is a {type(layer).__name__}, expected nn.TransformerEncoderLayer. "
            "Describe its layers with ffattr.register_adapter."
        )
    attention = require_plain_attention(layer.self_attn)
    before, after = ((layer.norm1, layer.norm2), (None, None))[:: 1 if layer.norm_first else -1]
    return make_layer_spec(layer, attention, before, after)


def make_layer_spec(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
    attention: nn.MultiheadAttention,
    before: tuple[nn.Module | None, ...],
    after: tuple[nn.Module | None, ...],
    cross: CrossSpec | None = None,
) -> LayerSpec:
    """Describes a layer by its attention to its own tokens and its feed-forward block, the first and the last of what
    the norms ``before`` and ``after`` belong to."""
    return LayerSpec(
        module=layer,
        attention=attention,
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        value=find_values(attention),
        out=attention.out_proj,
        up=layer.linear1,
        down=layer.linear2,
        activation=layer.activation,
        norm_before_attn=before[0],
        norm_after_attn=after[0],
        norm_before_ff=before[-1],
        norm_after_ff=after[-1],
        cross=cross,
    )


def find_values(attention: nn.MultiheadAttention) -> Columns:
    """Returns the value projection, the last third of what all three lie in together."""
    return Columns(attention, 2 * attention.embed_dim, 3 * attention.embed_dim)


def require_plain_attention(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Returns it. Raises `UnsupportedModel` where it attends to more than its tokens, or reads them in three pieces."""
    if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
        raise UnsupportedModel("the nn.MultiheadAttention has add_bias_kv, add_zero_attn or separate key/value widths")
    return attention
