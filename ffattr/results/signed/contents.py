"""The fields of `Contributions`, what its boundaries are called, and the texts whose tokens give to a number.

Shapes: ``K`` numbers of ``B`` sequences, ``L`` layers with ``L + 1`` boundaries, ``T`` tokens, ``n`` of them real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...selection import sequence
from ..contents import Labelled, Ticks
from ..kept.policy import Kept

__all__ = [
    "CROSS_FLOW",
    "FLOW",
    "SignedContents",
    "Text",
    "find_boundary",
    "find_target",
    "list_texts",
    "measure_error",
    "name_boundaries",
    "name_own",
    "split_targets",
]

FLOW = "flow"
"""What the only scope of what is kept of flow is called."""

CROSS_FLOW = "cross.flow"
"""What flow from an encoder's tokens to a decoder's is called where rows are handed on (`ffattr.Reduce`)."""


@dataclass(eq=False)
class SignedContents(Labelled):
    """The fields of `Contributions`, which says what they are."""

    value: Tensor
    scores: Tensor
    bias: Tensor
    error: Tensor
    targets: list[list[str]]
    positions: Tensor
    tokens: list[list[str]]
    mask: Tensor
    layers: tuple[int, ...]
    scope: str | None = None
    kept: Kept | None = None
    cross_kept: Kept | None = None
    residual: Tensor | None = None
    cross_scores: Tensor | None = None
    cross_tokens: list[list[str]] | None = None
    cross_mask: Tensor | None = None
    encoder: SignedContents | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: list[list[str]] | None = None


@dataclass(frozen=True)
class Text:
    """Tokens that give to a number: ``scores`` ``[K, B, T]``, ``mask`` ``[B, T]``, and ``bias`` ``[K, B]`` of theirs.

    ``stack`` tells an encoder's text from a decoder's (``""`` where there is but one), ``boundary`` is what the place
    is called at which the scores are.
    """

    stack: str
    boundary: str
    scores: Tensor
    bias: Tensor
    tokens: Sequence[Sequence[str]]
    mask: Tensor

    def label_tokens(self, batch: int) -> Ticks:
        """Names the real tokens of a sequence."""
        return label_tokens(self.mask[batch], self.tokens[batch] if self.tokens else [])

    def read_scores(self, target: int, batch: int) -> Tensor:
        """Returns the scores ``[n]`` of the real tokens of a sequence in float64, on the CPU."""
        return self.scores[target, batch].detach().cpu().double()[self.mask[batch].cpu()]


def label_tokens(mask: Tensor, tokens: Sequence[str]) -> Ticks:
    """Names the tokens where ``mask`` ``[T]`` is True."""
    real = mask.cpu()
    return Ticks.from_positions(torch.arange(len(real)), real, tokens, None)


def list_texts(contents: SignedContents, place: int) -> list[Text]:
    """Lists the texts that give to the numbers at boundary ``place``; their scores and biases add up to the values.

    At the first layer of a decoder that is followed into its encoder, the encoder's text is told at the encoder's first
    kept boundary; elsewhere it is what the states give that the layers from there on read.
    """
    here = name_boundaries(contents)[place]
    if contents.cross_scores is None or contents.cross_mask is None:
        return [Text("", here, contents.scores[:, place], contents.bias[:, place], contents.names, contents.mask)]
    own = Text("decoder", here, contents.scores[:, place], contents.bias[:, place], contents.names, contents.mask)
    encoder = contents.encoder
    if encoder is not None and place == 0 and contents.layers[0] == 0:
        first = name_boundaries(encoder)[0]
        text = Text("encoder", first, encoder.scores[:, 0], encoder.bias[:, 0], encoder.names, encoder.mask)
    else:
        scores, nothing = contents.cross_scores[:, place], torch.zeros_like(contents.bias[:, place])
        text = Text("encoder", here, scores, nothing, contents.cross_tokens or [], contents.cross_mask)
    return [text, own]


def name_own(contents: SignedContents) -> str:
    """Returns what the stack of the contents' own tokens is called, ``""`` where there is no other."""
    return "" if contents.cross_scores is None else "decoder"


def name_boundaries(contents: SignedContents) -> list[str]:
    """Returns what each boundary is called: the layer that it is the input of, the last one the output."""
    return [*(f"layer {layer}" for layer in contents.layers), "output"]


def find_boundary(contents: SignedContents, layer: int | None) -> int:
    """Returns the place of the input of the model's ``layer``; -1 is the output of the last one, None the first place.

    Raises TypeError or IndexError naming what was asked for.
    """
    if layer is None:
        return 0
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(
            f"layer is {layer!r}, expected a number of the model's layers, or -1 for the output of the last"
        )
    count = len(contents.layers) + 1
    if layer in contents.layers:
        return contents.layers.index(layer)
    if -count <= layer < 0:
        return layer + count
    raise IndexError(
        f"layer {layer} was not kept: there are the inputs of the layers {', '.join(map(str, contents.layers))}, and "
        "the output of the last one, -1"
    )


def find_target(contents: SignedContents, target: int, batch: int) -> tuple[int, int]:
    """Returns the places of a target and of a sequence, which may be negative. Raises TypeError or IndexError."""
    count = len(contents.value)
    if not isinstance(target, int) or isinstance(target, bool):
        raise TypeError(f"target is {target!r}, expected its number, from 0 to {count - 1}")
    if not -count <= target < count:
        raise IndexError(f"target {target} does not exist: there are {count}")
    return target % count, sequence(batch, len(contents.mask))


def split_targets(kept: Kept, targets: int) -> Tensor:
    """Returns flow ``[K, L, B, ..., N, T]`` by target. Raises ValueError where it was not kept whole."""
    flow: Tensor = kept.whole_map(FLOW).unflatten(0, (targets, -1))
    return flow


def measure_error(value: Tensor, bias: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Returns how far ``bias`` and the sums of ``parts`` ``[..., T]`` are from ``value``, relative to the largest of
    the numbers and of what each part is made of."""
    total, size = bias, torch.maximum(value.abs(), bias.abs())
    for part in parts:
        total, size = total + part.sum(-1), torch.maximum(size, part.abs().sum(-1))
    found: Tensor = (total - value).abs() / size.clamp_min(torch.finfo(value.dtype).tiny)
    return found
