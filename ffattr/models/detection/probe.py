"""What of a model that no adapter knows is tried, and on what: its lists of equal modules, and small inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.run import find_device

__all__ = ["BATCH", "TOKENS", "Undetected", "find_stacks", "make_inputs", "refuse_experts"]

BATCH, TOKENS = 2, 5  # unequal, so that a layout tells itself


class Undetected(Exception):
    """Why the structure of a model was not found, and what was: the path of its layers, parts of one layer."""

    def __init__(self, reason: str, layers: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason.rstrip(".")
        self.layers = layers
        self.parts: Mapping[str, Any] = {}


def find_stacks(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Finds lists of modules of one class with projections in each, by path, those inside such a module left out."""
    found: dict[str, list[nn.Module]] = {}

    def search_children(module: nn.Module, path: str) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            children = [getattr(child, "_orig_mod", child) for child in module]
            if len({type(child) for child in children}) == 1 and all(_has_matrices(child) for child in children):
                found[path] = children
                return
        for name, child in module.named_children():
            search_children(child, f"{path}.{name}" if path else name)

    search_children(base, "")
    return found


def _has_matrices(layer: nn.Module) -> bool:
    """Tells a block, which has several modules with a matrix, from a single projection."""
    return sum(any(p.dim() == 2 for p in module.parameters(recurse=False)) for module in layer.modules()) > 1


def refuse_experts(layer: nn.Module, stack: str, number: int) -> None:
    for path, module in layer.named_modules():
        what = None
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(map(_has_matrices, module)):
            what = f"{path!r} is a list of {len(module)} {type(module[0]).__name__}"
        elif not type(module).__name__.startswith("Conv"):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    what = f"{f'{path}.{name}' if path else name!r} is {list(parameter.shape)}"
        if what is not None:
            raise Undetected(f"layer {number} of {stack!r} looks like a mixture of experts: {what}", stack)


def make_inputs(base: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields small inputs to try in turn: ids that are neither special nor in order, an image, features."""
    accepted = inspect.signature(base.forward).parameters
    device = find_device(base)
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(base, "config", None)
    table = next((module for module in base.modules() if isinstance(module, nn.Embedding)), None)
    name = "input_ids" if "input_ids" in accepted else next(iter(accepted), None)
    if table is not None and name is not None:
        settings = {} if config is None else vars(config)
        special = [value for key, value in settings.items() if key.endswith("_token_id")]
        plain = [number for number in range(min(table.num_embeddings, 64)) if number not in special] or [0]
        order = (3, 7, 5, 9, 4, 8, 6, 2, 10, 1)
        ids = torch.tensor([plain[place % len(plain)] for place in order], device=device)
        yield {name: ids.view(BATCH, TOKENS)}
    generator = torch.Generator().manual_seed(0)
    size = getattr(config, "image_size", None)
    if "pixel_values" in accepted and isinstance(size, int):
        shape = (BATCH, int(getattr(config, "num_channels", 3)), size, size)
        yield {"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)}
    width = next((w for w in map(_find_width, base.modules()) if w is not None), None)
    if name is not None and name != "input_ids" and width is not None:
        yield {name: torch.randn(BATCH, TOKENS, width, generator=generator).to(device, dtype)}


def _find_width(module: nn.Module) -> int | None:
    """Returns how many features a module reads that comes first in a model of features."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    return int(module.in_features) if isinstance(module, nn.Linear) else None
