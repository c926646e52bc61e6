"""Images and recordings: how many tokens a model makes of them, which are padding, and what to call them.

None of it can be read off the inputs, so the model is run up to the attention of its first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..capture.recorder import record_first_attention
from ..registry import ModelDescription
from .given import find_valid

__all__ = ["SIGNALS", "check_signal", "find_signal_tokens"]

#: The arguments of a forward that hold them, with their dimensions and what makes them.
SIGNALS = {
    "pixel_values": (("batch", "channels", "height", "width"), "image processor"),
    "input_values": (("batch", "samples"), "feature extractor"),
    "input_features": (("batch", "mel bins", "frames"), "feature extractor"),
}


def check_signal(description: ModelDescription, name: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError where the model could not make sense of ``given[name]`` or of its mask."""
    signal: Tensor = given[name]
    shape, (dimensions, maker) = tuple(signal.shape), SIGNALS[name]
    layout = f"[{', '.join(dimensions)}]"
    if not signal.is_floating_point():
        raise TypeError(f"{name} has dtype {signal.dtype}, expected floats {layout} as from the model's {maker}")
    if len(shape) != len(dimensions):
        hint = f". For a single one pass {name}[None]" if len(shape) == len(dimensions) - 1 else ""
        raise ValueError(f"{name} has shape {shape}, expected {layout}{hint}")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}: it is empty. Expected {layout}.")
    parameter = next((p for p in description.base.parameters() if p.is_floating_point()), signal)
    if signal.dtype != parameter.dtype and not torch.is_autocast_enabled(signal.device.type):
        raise TypeError(
            f"{name} has dtype {signal.dtype}, but the model has {parameter.dtype}. Use .to({parameter.dtype})."
        )
    mask = given.get("attention_mask")
    if name == "input_values" and isinstance(mask, Tensor) and mask.shape != signal.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected that of {name}: {shape}")


def find_signal_tokens(
    description: ModelDescription, name: str, given: Mapping[str, Any]
) -> tuple[Tensor, list[list[str]]]:
    """Finds which tokens are valid ``[B, T]``, and names them: ``row,column`` of a patch, a position in a recording.

    Raises `ForwardError` with the model's own words where it takes no such inputs.
    """
    signal: Tensor = given[name]
    attention = record_first_attention(description, given)
    batch, _, _, length = attention.shape
    mask = given.get("attention_mask") if name == "pixel_values" else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(batch, length)}: {name} makes {length} tokens"
        )
    valid = find_valid(attention).to(signal.device)
    names = _name_patches(description, signal, length) if name == "pixel_values" else None
    names = [str(position) for position in range(length)] if names is None else names
    return valid, [list(names) for _ in range(batch)]


def _name_patches(description: ModelDescription, images: Tensor, length: int) -> list[str] | None:
    """Names the special tokens, and ``row,column`` of each patch; None where the patches are not so many."""
    size: Any = getattr(getattr(description.base, "config", None), "patch_size", None)
    if size is None:
        return None
    patch = (size, size) if isinstance(size, int) else tuple(size)
    rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    names = [*description.special_tokens, *(f"{row},{column}" for row in range(rows) for column in range(columns))]
    return names if len(names) == length else None
