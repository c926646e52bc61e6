"""Layers of a transformers model, by the data of `families`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .families.schema import Family, Fused, PerExpert
from .families.table import FAMILIES
from .spec.described import ModelDescription
from .spec.experts import Stacked
from .spec.layer import CrossSpec, LayerSpec
from .spec.weights import Columns, ParameterRef, Scaled

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
        raise UnsupportedModel(_explain_lack(config, repr(error.name))) from None


def _describe_family(base: nn.Module, model_type: str, config: Any) -> ModelDescription:
    entry = FAMILIES[model_type]
    found = entry(config) if callable(entry) else entry
    if isinstance(found, Family):
        if getattr(config, "add_cross_attention", False):
            raise UnsupportedModel(
                f"{type(base).__name__} has cross-attention (config.add_cross_attention is True) without an encoder of "
                "its own; the decomposition covers it in models that have both"
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
    modules = _resolve_path(base, paths) if isinstance(paths, str) else [_resolve_path(base, path) for path in paths]
    return tuple(_make_spec(family, module, base.config) for module in modules)


def _make_spec(family: Family, layer: nn.Module, config: Any) -> LayerSpec:
    layer = getattr(layer, "_orig_mod", layer)
    if family.dense is not None and family.experts is not None and not _has_path(layer, family.experts):
        family = family.dense
    if family.older is not None and not _has_path(layer, family.out):
        family = family.older
    heads = int(getattr(config, family.heads))
    kv_heads = family.kv_heads or getattr(config, "num_key_value_heads", None)
    if family.heads != "num_attention_heads":  # the other may speak of the other stack
        kv_heads = heads

    def find_part(where: Any) -> Any:
        if isinstance(where, str):
            found = _resolve_path(layer, where)
            owner, _, name = where.rpartition(".")
            return (
                ParameterRef(_resolve_path(layer, owner) if owner else layer, name)
                if isinstance(found, Tensor)
                else found
            )
        if isinstance(where, PerExpert):
            return _make_stacked(where, find_part(family.experts))
        if not isinstance(where, Fused):  # None, or the thing itself
            return where
        module = _resolve_path(layer, where.path)
        width = (module.nf if hasattr(module, "nf") else module.out_features) // (where.count * where.groups)
        bias = find_part(where.bias)
        return Columns(module, where.index * width, (where.index + 1) * width, where.groups, bias)

    def find_norm(where: str | None) -> Any:
        found = find_part(where)
        return None if isinstance(found, nn.Identity) else found

    def find_scaled(where: str | PerExpert, scale: str | None) -> Any:
        if scale is None:
            return find_part(where)
        factor = find_part(scale)  # one for each feature, or a number
        return Scaled(
            find_part(where), factor if isinstance(factor, ParameterRef) else torch.tensor(factor, dtype=torch.float64)
        )

    cross = None
    if family.cross_attention is not None:
        cross = CrossSpec(
            attention=find_part(family.cross_attention),
            heads=heads,
            kv_heads=heads,
            value=find_part(family.cross_value),
            out=find_part(family.cross_out),
            norm_after_attn=find_norm(family.norm_after_cross),
        )
    return LayerSpec(
        module=layer,
        attention=find_part(family.attention),
        heads=heads,
        kv_heads=int(kv_heads or heads),
        value=find_part(family.value),
        out=find_scaled(family.out, family.scale_of_attn),
        up=find_part(family.up),
        gate=find_part(family.gate),
        down=find_scaled(family.down, family.scale_of_ff),
        activation=find_part(family.activation),
        norm_before_attn=find_norm(family.norm_before_attn),
        norm_of_attn=find_norm(family.norm_of_attn),
        norm_after_attn=find_norm(family.norm_after_attn),
        norm_before_ff=find_norm(family.norm_before_ff),
        norm_of_ff=find_norm(family.norm_of_ff),
        norm_after_ff=find_norm(family.norm_after_ff),
        parallel=family.parallel,
        clamp=family.clamp,
        experts=find_part(family.experts),
        active=1 if family.experts is None else int(config.num_experts_per_tok),
        cross=cross,
    )


def _make_stacked(where: PerExpert, experts: nn.Module) -> Stacked:
    width = _resolve_path(experts, where.weight).shape[2 if where.out_last else 1]
    if where.bias is not None:
        _resolve_path(experts, where.bias)  # raises here where it is missing, not when it is read
    if where.alternating:
        start, stop, step = where.index, width, where.count
    else:
        start, stop, step = where.index * width // where.count, (where.index + 1) * width // where.count, 1
    return Stacked(experts, where.weight, where.bias, start, stop, step, where.out_last)


def _has_path(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _count_positions(base: nn.Module, family: Family) -> int | None:
    return None if family.positions is None else _count_rows(_resolve_path(base, family.positions))


def _resolve_path(root: nn.Module, path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = f"{path!r} (stopped at {name!r} of {type(found).__name__})"
            raise UnsupportedModel(_explain_lack(root, where)) from None
        found = getattr(found, "_orig_mod", found)
    return found


def _explain_lack(owner: Any, what: str) -> str:
    return (
        f"{type(owner).__name__} has no {what}, which its family is known to have: a variant or a version of the model "
        "that ffattr does not know. Describe its layers with ffattr.register_adapter."
    )


def _count_rows(table: nn.Embedding) -> int:
    """Counts usable positions: RoBERTa's table keeps the rows up to its padding index unused, OPT's the first two."""
    unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(unused)
