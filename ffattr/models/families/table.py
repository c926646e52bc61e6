"""The families of transformers, as data: where in the module tree each part of a layer lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .decoders import DECODERS
from .encoder_decoder import ENCODER_DECODERS
from .encoders import ENCODERS
from .latent import LATENT
from .mixtures import MIXTURES
from .own_attention import OWN_ATTENTION
from .schema import EncoderDecoder, Family
from .shared_experts import SHARED_EXPERTS

__all__ = ["FAMILIES"]

#: ``config.model_type`` to its family, or to the choice of one by configuration.
FAMILIES: Mapping[str, Family | EncoderDecoder | Callable[[Any], Family | EncoderDecoder]] = MappingProxyType(
    {**ENCODERS, **DECODERS, **OWN_ATTENTION, **MIXTURES, **SHARED_EXPERTS, **LATENT, **ENCODER_DECODERS}
)
