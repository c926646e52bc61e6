"""One layer of a transformers model, by the data of its family: every path is followed to the module that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .families.schema import Family, Fused, PerExpert
from .spec.experts import Stacked
from .spec.layer import BranchSpec, CrossSpec, LatentSpec, LayerSpec
from .spec.weights import Columns, ParameterRef, Scaled
from .spec.wrapped import find_owner

__all__ = ["explain_lack", "make_layer_spec", "resolve_path"]


def make_layer_spec(family: Family, layer: nn.Module, config: Any) -> LayerSpec:
    """Describes a layer by its family. Raises `UnsupportedModel` where it lacks a module that the family has, and
    AttributeError where the configuration lacks a setting."""
    layer = getattr(layer, "_orig_mod", layer)
    if family.dense is not None and family.experts is not None and not _has_path(layer, family.experts):
        family = family.dense
    if family.older is not None and not _has_path(layer, family.out):
        family = family.older
    return _Parts(family, layer, config).make_spec()


class _Parts:
    """The modules of one layer, by the paths of its family."""

    def __init__(self, family: Family, layer: nn.Module, config: Any) -> None:
        self.family, self.layer, self.config = family, layer, config
        self.heads = int(getattr(config, family.heads))
        kv_heads = family.kv_heads or getattr(config, "num_key_value_heads", None)
        if family.heads != "num_attention_heads":  # the other may speak of the other stack
            kv_heads = self.heads
        self.kv_heads = int(kv_heads or self.heads)

    def make_spec(self) -> LayerSpec:
        family = self.family
        latent = self.find_latent()
        return LayerSpec(
            module=self.layer,
            attention=self.find(family.attention),
            heads=self.heads,
            kv_heads=self.kv_heads if latent is None else self.heads,
            value=self.find(family.value) if latent is None else self.find_value_of_latent(),
            out=self.find_scaled(family.out, family.scale_of_attn),
            up=self.find(family.up),
            gate=self.find(family.gate),
            down=self.find_scaled(family.down, family.scale_of_ff),
            activation=self.find(family.activation),
            norm_before_attn=self.find_norm(family.norm_before_attn),
            norm_of_attn=self.find_norm(family.norm_of_attn),
            norm_after_attn=self.find_norm(family.norm_after_attn),
            norm_before_ff=self.find_norm(family.norm_before_ff),
            norm_of_ff=self.find_norm(family.norm_of_ff),
            norm_after_ff=self.find_norm(family.norm_after_ff),
            norm_of_values=self.find_norm(family.norm_of_values),
            parallel=family.parallel,
            clamp=family.clamp,
            experts=self.find(family.experts),
            active=1 if family.experts is None else int(getattr(self.config, family.active)),
            cross=self.find_cross(),
            shared=self.find_shared(),
            router=self.find(family.router),
            scales_input=family.scales_input,
            latent=latent,
        )

    def find(self, where: Any) -> Any:
        """Returns what is at a path; None, or the thing itself, as it is."""
        if isinstance(where, str):
            found = resolve_path(self.layer, where)
            owner, _, name = where.rpartition(".")
            return (
                ParameterRef(resolve_path(self.layer, owner) if owner else self.layer, name)
                if isinstance(found, Tensor)
                else found
            )
        if isinstance(where, PerExpert):
            return _make_stacked(where, self.find(self.family.experts))
        if not isinstance(where, Fused):
            return where
        module = resolve_path(self.layer, where.path)
        width = (module.nf if hasattr(module, "nf") else module.out_features) // (where.count * where.groups)
        return Columns(module, where.index * width, (where.index + 1) * width, where.groups, self.find(where.bias))

    def find_norm(self, where: str | None) -> Any:
        found = self.find(where)
        return None if isinstance(found, nn.Identity) else found

    def find_scaled(self, where: str | PerExpert, scale: str | None) -> Any:
        found = self.find(where)
        if scale is None:
            return found
        factor = self.find(scale)  # one for each feature, or a number
        if isinstance(found, Stacked):
            return replace(found, factor=float(factor))
        return Scaled(found, factor if isinstance(factor, ParameterRef) else torch.tensor(factor, dtype=torch.float64))

    def find_cross(self) -> CrossSpec | None:
        family = self.family
        if family.cross_attention is None:
            return None
        return CrossSpec(
            attention=self.find(family.cross_attention),
            heads=self.heads,
            kv_heads=self.heads,
            value=self.find(family.cross_value),
            out=self.find(family.cross_out),
            norm_after_attn=self.find_norm(family.norm_after_cross),
        )

    def find_shared(self) -> BranchSpec | None:
        """Returns the network beside the experts, of which a configuration may have none."""
        shared = self.family.shared
        if shared is None or not _has_path(self.layer, shared.down.rpartition(".")[0]):
            return None
        return BranchSpec(
            up=self.find(shared.up),
            down=self.find_scaled(shared.down, self.family.scale_of_ff),
            activation=self.find(shared.activation),
            gate=self.find(shared.gate),
            weigher=self.find(shared.weigher),
        )

    def find_latent(self) -> LatentSpec | None:
        family = self.family
        if family.latent is None:
            return None
        width = int(getattr(self.config, family.latent_width))
        return LatentSpec(Columns(self.find(family.latent), 0, width), self.find(family.norm_of_latent))

    def find_value_of_latent(self) -> Columns:
        """Returns the values' part of a projection that makes, for each head, keys and then values."""
        start = int(self.config.qk_nope_head_dim)
        return Columns(self.find(self.family.value), start, start + int(self.config.v_head_dim), self.heads)


def _make_stacked(where: PerExpert, experts: nn.Module) -> Stacked:
    width = resolve_path(experts, where.weight).shape[2 if where.out_last else 1]
    if where.bias is not None:
        resolve_path(experts, where.bias)  # raises here where it is missing, not when it is read
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


def resolve_path(root: nn.Module, path: str) -> Any:
    """Returns what is at a dotted path, without the wrapper of torch.compile. Raises `UnsupportedModel`."""
    found: Any = root
    for name in path.split("."):
        try:
            found = getattr(find_owner(found, name), name)
        except AttributeError:
            where = f"{path!r} (stopped at {name!r} of {type(found).__name__})"
            raise UnsupportedModel(explain_lack(root, where)) from None
        found = getattr(found, "_orig_mod", found)
    return found


def explain_lack(owner: Any, what: str) -> str:
    """Says that a model is not like its family."""
    return (
        f"{type(owner).__name__} has no {what}, which its family is known to have: a variant or a version of the model "
        "that ffattr does not know. Describe its layers with ffattr.register_adapter."
    )
