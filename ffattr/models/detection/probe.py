"""What of a model that no adapter knows is tried, and on what: its lists of equal modules, and small inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.run import find_device

__all__ = ["BATCH", "TOKENS", "Undetected", "find_stacks", "list_layers", "make_inputs"]

BATCH, TOKENS = 2, 5  # unequal, so that a layout tells itself


class Undetected(Exception):
    """Why the structure of a model was not found, and what was: the path of its layers, the parts of some of them, of
    which ``numbers`` (None: of all) are like that, and whether they take ``[B, T, d]``. ``owners`` are parts of the
    model, by their paths, that hold but one of several lists of layers."""

    def __init__(self, reason: str, layers: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason.rstrip(".")
        self.layers = layers
        self.parts: Mapping[str, Any] = {}
        self.numbers: tuple[int, ...] | None = None
        self.batch_first = True
        self.owners: tuple[str, ...] = ()


def find_stacks(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Finds lists of modules with projections in each, by path: those inside a module of a list of equal ones left out.

    A list may hold None or nothing at some places.
    """
    found: dict[str, list[nn.Module]] = {}

    def search_children(module: nn.Module, path: str) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            children = list_layers(module)
            alike = len({type(child) for child in children}) == 1
            named = isinstance(module, nn.ModuleDict)  # mostly a module's parts, not its layers
            if all(_has_matrices(child) for child in children) and (len(children) > 1 and alike if named else children):
                found[path] = children
                if alike:
                    return
        for name, child in module.named_children():
            search_children(child, f"{path}.{name}" if path else name)

    search_children(base, "")
    return found


def list_layers(modules: Any) -> list[nn.Module]:
    """Lists what a list of modules holds, without None and modules that return what they are given."""
    held = modules.values() if isinstance(modules, nn.ModuleDict) else modules
    children = [getattr(child, "_orig_mod", child) for child in held]
    return [child for child in children if child is not None and not isinstance(child, nn.Identity)]


def _has_matrices(layer: nn.Module) -> bool:
    """Tells a block, which has several modules with a matrix, from a single projection."""
    return sum(any(p.dim() == 2 for p in module.parameters(recurse=False)) for module in layer.modules()) > 1


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
        ids = ids.view(BATCH, TOKENS)
        if "decoder_input_ids" in accepted:
            yield {name: ids, "decoder_input_ids": ids[:, 1:]}
        yield {name: ids}
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
