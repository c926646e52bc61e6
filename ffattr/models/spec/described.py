"""`ModelDescription`: what every adapter makes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .layer import LayerSpec

__all__ = ["ModelDescription"]


@dataclass(frozen=True)
class ModelDescription:
    """A model as the decomposition sees it: the module whose forward is run, and its layers in the order of running.

    ``base`` leaves heads out (no vocabulary-sized logits are computed). ``max_positions`` is the size of a learned
    position table, None where positions are not bounded by one. ``special_tokens`` come before an image's patches.

    ``numbers`` are those of the layers among all that the model has, where some do not attend and are left out; those
    are in ``left_out``, each with what it is. ``learned``: nothing is known of the model's inputs; the user's own are
    taken as they are, and its tokens are those that reach its first attention.

    ``stacks`` tells the layers of an "encoder" and a "decoder" apart; ``max_positions`` is then the encoder's,
    ``decoder_positions`` the decoder's. A "decoder" alone attends to tokens that come from elsewhere, too.
    """

    base: nn.Module
    layers: tuple[LayerSpec, ...]
    family: str
    batch_first: bool = True
    max_positions: int | None = None
    special_tokens: tuple[str, ...] = ()
    stacks: Mapping[str, range] = field(default_factory=dict)
    decoder_positions: int | None = None
    numbers: tuple[int, ...] | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    learned: bool = False
