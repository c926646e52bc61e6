"""Where matrices come from that depend on a layer's weights alone: whoever runs the engine may have kept them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Make", "Recall", "make_anew"]

Make = Callable[[], list[Tensor]]

Recall = Callable[[str, Make], list[Tensor]]
"""Gives the matrices of a name: what `Make` makes, or has made of the same weights before. Nobody writes into them."""


def make_anew(name: str, make: Make) -> list[Tensor]:
    """The matrices, of which nothing is kept."""
    return make()
