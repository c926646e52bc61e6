"""The head of a loaded model, found by the data of `families.heads`: what it may be, to be told by its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decomposition.activations import ACTIVATIONS
from ..decomposition.adjoint.head import Head, Piece
from ..decomposition.affine import Linear
from ..errors import UnsupportedModel
from .families.heads import FACTORS, FINAL_NORMS, HEADS, Reading
from .family_layer import resolve_path
from .spec.activation import identify_activation
from .spec.norms import read_norm
from .spec.weights import read_linear

__all__ = ["HeadSpec", "list_final_norms", "list_heads"]


@dataclass(frozen=True)
class HeadSpec:
    """Which modules of a model play which part behind its last layer.

    ``each`` acts on every token, ``then`` on what is read of them (by name: functions without a module), ``last`` makes
    the logits, to which ``bias`` ``[C]`` is added. ``reads``: which tokens are read.
    """

    each: tuple[nn.Module, ...]
    then: tuple[nn.Module | str, ...] = ()
    last: nn.Module | None = None
    bias: Tensor | None = None
    factor: float = 1.0
    reads: tuple[Reading, ...] = ("position",)

    def weights(self, dtype: torch.dtype) -> Head:
        """Reads the parameters in ``dtype``, those of the last projection, which may be large, as they are.

        Raises `UnsupportedModel` for a module that no formula covers.
        """
        last = None
        if self.last is not None:
            last = read_linear(self.last, None)
            if self.bias is not None:
                bias = self.bias.detach()
                last = Linear(last.weight, bias if last.bias is None else last.bias + bias)
        each, then = (tuple(_read_piece(part, dtype) for part in parts) for parts in (self.each, self.then))
        return Head(each, then, last, self.factor)


def list_final_norms(base: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """What may come behind the last layer of ``base``; nothing at all is among it."""
    for paths in FINAL_NORMS:
        found = tuple(_find_part(base, path) for path in paths)
        if not any(part is None for part in found):
            yield tuple(part for part in found if not isinstance(part, nn.Identity))


def list_heads(model: nn.Module, base: nn.Module) -> Iterator[HeadSpec]:
    """What the head of ``model``, whose layers are in ``base``, may be. Raises `UnsupportedModel` for capped logits."""
    config: Any = getattr(model, "config", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None and getattr(model, "lm_head", None) is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} caps its logits (config.final_logit_softcapping is {cap}), which no frozen layer "
            "adds up to. Pass a direction [d] as target, for instance a row of the output embedding, and model.model."
        )
    factors = _list_factors(config)
    bias = getattr(model, "final_logits_bias", None)
    for entry in HEADS:
        parts: list[Any] = [step[1:] if step.startswith("=") else _find_part(model, step) for step in entry.steps]
        if any(part is None for part in parts) or not _is_projection(parts[-1]):
            continue
        flat = bias.flatten() if isinstance(bias, Tensor) else None
        for each, factor in itertools.product(list_final_norms(base), factors):
            yield HeadSpec(each, tuple(parts[:-1]), parts[-1], flat, factor, entry.reads)


def _find_part(root: nn.Module, path: str) -> Any:
    """Returns what is at a path, None: nothing."""
    try:
        return resolve_path(root, path)
    except UnsupportedModel:
        return None


def _is_projection(part: Any) -> bool:
    if not isinstance(part, nn.Module):
        return False
    try:
        read_linear(part, None)
    except (UnsupportedModel, AttributeError, TypeError):
        return False
    return True


def _list_factors(config: Any) -> list[float]:
    """What logits may be multiplied by."""
    factor = 1.0
    for name, how in FACTORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            factor = factor * value if how == "times" else factor / value
    if getattr(config, "is_encoder_decoder", False) and hasattr(config, "d_model"):  # T5 with tied embeddings
        return [factor, factor * float(config.d_model) ** -0.5]
    return [factor]


def _read_piece(part: nn.Module | str, dtype: torch.dtype) -> Piece:
    if isinstance(part, str):
        return ACTIVATIONS[part]
    if _is_projection(part):
        return read_linear(part, dtype)
    try:
        norm = read_norm(part, dtype)
    except UnsupportedModel:
        return identify_activation(part)
    assert norm is not None
    return norm
