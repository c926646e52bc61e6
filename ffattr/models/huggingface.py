"""Layers of a transformers model, by the data of `families`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from .families.schema import Family
from .families.table import FAMILIES
from .family_layer import explain_lack, make_layer_spec, resolve_path
from .spec.described import ModelDescription
from .spec.layer import LayerSpec

__all__ = ["describe_pretrained"]


def describe_pretrained(base: nn.Module, model_type: str) -> ModelDescription:
    """Describes a headless transformers model by the data of its family.

    Raises `UnsupportedModel` where the model lacks a module, or its configuration a setting, that the family has.
    """
    config: Any = base.config
    try:
        return _describe_family(base, model_type, config)
    except AttributeError as error:
        if error.obj is not config:
            raise
        raise UnsupportedModel(explain_lack(config, repr(error.name))) from None


def _describe_family(base: nn.Module, model_type: str, config: Any) -> ModelDescription:
    entry = FAMILIES[model_type]
    found = entry(config) if callable(entry) else entry
    if isinstance(found, Family):
        if getattr(config, "add_cross_attention", False):
            raise UnsupportedModel(
                f"{type(base).__name__} has cross-attention (config.add_cross_attention is True), and its layers are "
                "not those of its family"
            )
        layers, positions = _make_specs(base, found), _count_positions(base, found)
        return ModelDescription(base, layers, model_type, max_positions=positions, special_tokens=found.special_tokens)
    if not config.is_encoder_decoder:  # T5EncoderModel
        layers = _make_specs(base, found.encoder)
        return ModelDescription(base, layers, model_type, max_positions=_count_positions(base, found.encoder))
    encoder, decoder = _make_specs(base, found.encoder), _make_specs(base, found.decoder)
    return ModelDescription(
        base,
        encoder + decoder,
        model_type,
        max_positions=_count_positions(base, found.encoder),
        stacks={"encoder": range(len(encoder)), "decoder": range(len(encoder), len(encoder) + len(decoder))},
        decoder_positions=_count_positions(base, found.decoder),
    )


def _make_specs(base: nn.Module, family: Family) -> tuple[LayerSpec, ...]:
    paths = family.layers
    modules = resolve_path(base, paths) if isinstance(paths, str) else [resolve_path(base, path) for path in paths]
    return tuple(make_layer_spec(family, module, base.config) for module in modules)


def _count_positions(base: nn.Module, family: Family) -> int | None:
    return None if family.positions is None else _count_rows(resolve_path(base, family.positions))


def _count_rows(table: nn.Embedding) -> int:
    """Counts usable positions: RoBERTa's table keeps the rows up to its padding index unused, OPT's the first two."""
    unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(unused)
