"""Small random models of every supported family, for tests.

All parameters are random, gains and biases too, so that nothing hides behind ones and zeros. In float64 the RMSNorm
modules of transformers, which compute in float32 whatever their input, are replaced by ``nn.RMSNorm``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from tiny_configs import (
    ENCODER_DECODERS,
    FAMILIES,
    HF_FAMILIES,
    IMAGE_FAMILIES,
    LAYERS,
    MIXTURES,
    MODELS,
    MORE_ENCODER_DECODERS,
    MORE_FAMILIES,
    MORE_MIXTURES,
    MORE_SHARED_EXPERTS,
    POSITIONS,
    SHARED_EXPERTS,
    SINCE,
    SOUND,
    SOUND_FAMILIES,
    TORCH_FAMILIES,
    VOCABULARY,
)
from torch import Tensor, nn
from versions import PINNED, RESTRUCTURED, have, is_older, needs

__all__ = [
    "ENCODER_DECODERS",
    "EVERY_FAMILY",
    "FAMILIES",
    "HF_FAMILIES",
    "IMAGE_FAMILIES",
    "LAYERS",
    "MIXTURES",
    "MORE_ENCODER_DECODERS",
    "MORE_FAMILIES",
    "MORE_MIXTURES",
    "MORE_SHARED_EXPERTS",
    "POSITIONS",
    "SHARED_EXPERTS",
    "SOUND_FAMILIES",
    "TORCH_FAMILIES",
    "VOCABULARY",
    "build",
    "ids",
    "inputs",
    "paddings",
    "samples",
]


EVERY_FAMILY = (
    *HF_FAMILIES,
    *MORE_FAMILIES,
    *MIXTURES,
    *MORE_MIXTURES,
    *SHARED_EXPERTS,
    *MORE_SHARED_EXPERTS,
    *ENCODER_DECODERS,
    *MORE_ENCODER_DECODERS,
)
"""Of transformers."""


def build(
    name: str, *, head: str = "Model", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> nn.Module:
    """Returns a random model in eval mode, the caller's own. ``overrides`` go to its configuration,
    ``attn_implementation`` included.

    ``head`` is the suffix of a transformers class, for instance ``ForSequenceClassification`` or ``LMHeadModel``.
    """
    if name in RESTRUCTURED:
        needs(str(PINNED), "whose experts lie together in one module, of those that are tested")
    try:
        hash(tuple(overrides.values()))
    except TypeError:
        return _make(name, head, dtype, seed, **overrides)
    return copy.deepcopy(_made(name, head, dtype, seed, **overrides))  # in a fraction of the time that making one takes


def _make(name: str, head: str, dtype: torch.dtype, seed: int, **overrides: Any) -> nn.Module:
    prefix, settings = MODELS[name]
    settings = {**settings, **overrides}
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why the nested-tensor path is not taken
            model = (
                _torch(prefix, settings) if prefix.startswith("Transformer") else _transformers(prefix, settings, head)
            )
        _randomise(model)
    finally:
        torch.set_rng_state(generator_state)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _exact_norms(model)
    return model


_made = functools.lru_cache(maxsize=64, typed=True)(_make)


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2, length: int = 7, padding: str | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for ``build(name)``: with ``padding`` (one of `paddings`) the last row has two padding tokens.

    Images have as many tokens as they have, whatever ``length``.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_FAMILIES:
        size = MODELS[name][1]["image_size"]
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)}
    if name in SOUND_FAMILIES:
        values = torch.randn(batch, samples(length), generator=generator, dtype=torch.float64)
        if padding is None:
            return {"input_values": values}
        lengths = torch.tensor([samples(length)] * (batch - 1) + [samples(length - 2) + 1])
        return {"input_values": values, "attention_mask": (torch.arange(samples(length)) < lengths[:, None]).long()}
    valid = torch.ones(batch, length, dtype=torch.bool)
    if padding is not None:
        valid[-1, slice(2) if padding == "left" else slice(-2, None)] = False
    if name in (*ENCODER_DECODERS, *MORE_ENCODER_DECODERS):
        return _two_sided(name, batch, length, seed, valid)
    if name not in TORCH_FAMILIES:
        return {"input_ids": ids(batch, length, seed), "attention_mask": valid.long()}
    width = MODELS[name][1]["d_model"]
    src = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    src = src if MODELS[name][1]["batch_first"] else src.transpose(0, 1)
    return {"src": src} if padding is None else {"src": src, "src_key_padding_mask": ~valid}


def _two_sided(name: str, batch: int, length: int, seed: int, valid: Tensor) -> dict[str, Tensor]:
    """The encoder has three tokens more than the decoder, and its last sequence one token of padding where the
    decoder's has two."""
    targets = {"decoder_input_ids": ids(batch, length, seed), "decoder_attention_mask": valid.long()}
    if name == "whisper":
        generator = torch.Generator().manual_seed(seed)
        frames = 2 * MODELS[name][1]["max_source_positions"]
        return {"input_features": torch.randn(batch, 6, frames, generator=generator, dtype=torch.float64), **targets}
    read = torch.ones(batch, length + 3, dtype=torch.long)
    read[-1, -1] = int(valid.all())
    return {"input_ids": ids(batch, length + 3, seed + 1), "attention_mask": read, **targets}


def paddings(name: str) -> tuple[str | None, ...]:
    """The kinds of padding that a family knows."""
    if name in IMAGE_FAMILIES:
        return (None,)
    # A softmax in float32 of a mask that is finite in float64 alone makes the first tokens NaN.
    return (None, "right") if name in (*SOUND_FAMILIES, "bloom", "mpt") else (None, "left", "right")


def samples(length: int) -> int:
    """The fewest samples of which ``length`` tokens are made."""
    for kernel, stride in zip(reversed(SOUND["conv_kernel"]), reversed(SOUND["conv_stride"]), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _transformers(prefix: str, settings: dict[str, Any], head: str) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    settings = {name: value for name, value in settings.items() if name not in SINCE or have(SINCE[name])}
    if not hasattr(transformers, f"{prefix}Config") and is_older():
        pytest.skip(f"transformers has no {prefix} yet")
    config = getattr(transformers, f"{prefix}Config")(vocab_size=VOCABULARY, **settings)
    config._experts_implementation = "eager"  # the other one takes no float64
    model: nn.Module = getattr(transformers, prefix + head)(config)
    return model


def _torch(cls: str, settings: dict[str, Any]) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**settings)
    return layer if cls == "TransformerEncoderLayer" else nn.TransformerEncoder(layer, LAYERS)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.4, 1.6).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1).mul_(0.7)
        else:
            parameter.normal_(std=1.4 / math.sqrt(min(parameter.shape)))


def _exact_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "OlmoLayerNorm":
                setattr(module, name, nn.LayerNorm(child.normalized_shape, 1e-5, elementwise_affine=False).eval())
            if type(child).__name__ in ("CohereLayerNorm", "Cohere2LayerNorm", "DebertaLayerNorm"):
                norm = nn.LayerNorm(child.weight.shape, child.variance_epsilon, bias=hasattr(child, "bias"))
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.to(child.weight.dtype).eval())
            if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")) and not isinstance(child, nn.RMSNorm):
                eps = getattr(child, "variance_epsilon", None) or child.eps
                weight = getattr(child, "weight", None)
                if weight is None:  # of a router, or of every head's values
                    width = module.hidden_size if hasattr(module, "hidden_size") else module.head_dim
                    setattr(module, name, nn.RMSNorm(width, eps=eps, elementwise_affine=False).eval())
                    continue
                norm = nn.RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype)
                plain = not type(child).__name__.startswith("Gemma") or hasattr(child, "with_scale")
                norm.weight = weight if plain else nn.Parameter(weight + 1)
                setattr(module, name, norm.eval())
