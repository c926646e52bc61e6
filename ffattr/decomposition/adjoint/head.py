"""What a model does with the output of its last layer, frozen by the same rules as a layer.

A head reads the last hidden states ``[T, d]`` at some tokens, carries what it read through norms, projections and
activations, and ends with a projection to logits, one column of which (or the difference of two) is the number that is
explained. Norms are frozen by their statistics, activations by their Integrated-Gradients slopes; logits are explained,
never probabilities, whose softmax nothing here is linear in.

Shapes: ``K`` targets, ``R`` reads, ``T`` tokens, ``d`` model width, ``C`` logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import integrated_gradients as ig
from ..activations import Activation
from ..affine import Linear, Norm
from ..reference import Rule
from .pieces import transpose_norm

__all__ = ["Head", "Piece", "ReadOut", "Reads", "pull_states", "read_out"]

Piece = Norm | Linear | Activation | float
"""A norm, a projection, an element-wise function, or a factor."""


@dataclass(frozen=True)
class Head:
    """``each``: what is done to every token, the model's final norm. ``then``: what is done to what is read of them.

    ``last`` makes the logits, ``[d, C]``, which ``factor`` multiplies; None: what is read is the result itself.
    """

    each: tuple[Piece, ...]
    then: tuple[Piece, ...] = ()
    last: Linear | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Reads:
    """Which tokens are read, by ``R`` reads: ``weights[p]`` ``[R, T]`` of part ``p``, which stand side by side.

    A single token is a row with one 1, the mean of all ``1 / T`` everywhere. ``of_target`` ``[K]`` says which read a
    target is of.
    """

    weights: tuple[Tensor, ...]
    of_target: Tensor


@dataclass(frozen=True)
class ReadOut:
    """The number ``value`` ``[K]`` of each target as recomputed from the last hidden states, the ``directions``
    ``[K, T, d]`` in which it reads them, and the ``constant`` ``[K]`` that comes from none of them.

    ``size`` ``[K]`` is how large ``value`` might be, which its rounding error is relative to.
    """

    value: Tensor
    size: Tensor
    directions: Tensor
    constant: Tensor


def read_out(head: Head, hidden: Tensor, reads: Reads, targets: Tensor, shift: Tensor, rule: Rule) -> ReadOut:
    """Carries the last hidden states ``[T, d]`` through a head and the targets back.

    ``targets`` ``[K, c]`` are the directions in which a target reads what the head's last projection reads, and
    ``shift`` ``[K]`` what is added to it. ``rule`` is that of Integrated Gradients; its path starts where only biases
    are present for the baseline ``"bias"``, and at zero for all others.
    """
    used = torch.stack([part.abs().sum(0) for part in reads.weights]).sum(0).nonzero()[:, 0]
    from_bias = rule.baseline == "bias"
    each = _Chain(head.each, rule.name, rule.steps, from_bias)
    tokens = each.forward(hidden[used])
    pools = [part[:, used].to(tokens) for part in reads.weights]
    start = None if each.free is None else torch.cat([part @ each.free for part in pools], -1)
    then = _Chain(head.then, rule.name, rule.steps, from_bias, start)
    found = then.forward(torch.cat([part @ tokens for part in pools], -1))
    read = found[reads.of_target]
    value = (read * targets).sum(-1) + shift
    size = read.norm(dim=-1) * targets.norm(dim=-1) + shift.abs()

    # Each target goes back by itself, through what is frozen at its own read.
    pulled, constant = then.backward(targets, reads.of_target)
    parts = pulled.chunk(len(pools), -1)
    wide = sum(part[:, None] * pool[reads.of_target][..., None] for part, pool in zip(parts, pools, strict=True))
    assert isinstance(wide, Tensor)
    flat, free = each.backward(wide.flatten(0, 1), torch.arange(len(used), device=used.device).repeat(len(targets)))
    constant = constant + free.view(len(targets), -1).sum(-1) + shift
    directions = hidden.new_zeros(len(targets), *hidden.shape)
    directions[:, used] = flat.view(len(targets), len(used), -1)
    return ReadOut(value, size, directions, constant)


def pull_states(each: Sequence[Piece], hidden: Tensor, directions: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Carries the last hidden states ``[T, d]`` of an encoder through what is done to every token, and back.

    Returns the states ``[T, d]`` that a decoder reads, the directions ``[K, T, d]`` in which these, read in
    ``directions``, read the hidden states, and the constant ``[K]``.
    """
    chain = _Chain(each, rule.name, rule.steps, rule.baseline == "bias")
    states = chain.forward(hidden)
    rows = torch.arange(len(hidden), device=hidden.device).repeat(len(directions))
    flat, free = chain.backward(directions.flatten(0, 1), rows)
    return states, flat.view_as(directions), free.view(len(directions), len(hidden)).sum(-1)


class _Chain:
    """Some pieces one after the other, and what stays frozen of them: a number or a factor of each row and piece.

    ``free`` ``[m, c]`` is what comes from no token, kept where a path starts there.
    """

    def __init__(
        self, pieces: Sequence[Piece], rule: str, steps: int, from_bias: bool, free: Tensor | None = None
    ) -> None:
        self.pieces, self.rule, self.steps, self.from_bias = pieces, rule, steps, from_bias
        self.free = free
        self._frozen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Carries ``[m, c]`` through all pieces."""
        if self.from_bias and self.free is None:
            self.free = torch.zeros_like(x)
        for piece in self.pieces:
            none = x.new_zeros(())
            if isinstance(piece, Norm):
                scale = piece.scale(x)
                self._frozen.append((scale, none))
                self.free = None if self.free is None else piece.affine(self.free, scale)
                x = piece.affine(x, scale)
            elif isinstance(piece, Activation):
                slope = ig.slope(x, piece, self.rule, self.steps, self.free)
                start = piece.value(torch.zeros_like(x)) if self.free is None else piece.value(self.free)
                start = start if self.free is None else start - slope * self.free
                self._frozen.append((slope, start))
                self.free = None if self.free is None else slope * self.free + start
                x = piece.value(x)
            elif isinstance(piece, Linear):
                self._frozen.append((none, none))
                self.free = None if self.free is None else piece(self.free)
                x = piece(x)
            else:
                self._frozen.append((none, none))
                self.free = None if self.free is None else self.free * piece
                x = x * piece
        return x

    def backward(self, directions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pulls directions ``[k, c]`` back to what was read; ``rows`` ``[k]`` says which row each belongs to.

        Returns them and what comes from no token, ``[k]``.
        """
        constant = directions.new_zeros(len(directions))
        for piece, (factor, start) in zip(reversed(self.pieces), reversed(self._frozen), strict=True):
            if isinstance(piece, Activation):
                constant = constant + (directions * start[rows]).sum(-1)
                directions = directions * factor[rows]
                continue
            if isinstance(piece, (Norm, Linear)) and piece.bias is not None:
                constant = constant + directions @ piece.bias
            if isinstance(piece, Norm):
                directions = transpose_norm(piece, factor[rows], directions)
            else:
                directions = directions @ piece.weight.mT if isinstance(piece, Linear) else directions * piece
        return directions, constant
