"""The arguments ``target``, ``position`` and ``prompt_length`` of `ffattr.contributions`, checked.

A *target* is a number that the model computes: a logit, the difference of two, or what a direction reads off its last
hidden states. It is read at some tokens of every sequence, or where the model itself reads the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Column", "Positions", "Target", "find_masks", "parse_position", "parse_targets"]

Column = int | Literal["predicted", "next"]
"""Which logit: its number, the largest one, or that of the token that comes next in the input."""

Positions = list[list[int]] | Literal["mean"]
"""The tokens that are read of every sequence, counted without padding; or the mean of all of them."""

_EXPECTED = (
    "expected a token id, a text that is one token, a class or its label, 'predicted', 'next', a pair of these for "
    "their difference, a tensor [d] or [K, d], or a list of any of them"
)


@dataclass(frozen=True)
class Target:
    """A logit ``plus``, less ``minus`` where there is one; or a ``direction`` ``[d]``. ``label`` names it."""

    label: str
    plus: Column = 0
    minus: Column | None = None
    direction: Tensor | None = None


def parse_targets(asked: Any, tokenizer: Any, labels: Mapping[int, str] | None) -> list[Target]:
    """Returns what is to be explained. ``labels`` are those of a classifier, None: logits are of tokens.

    Raises TypeError or ValueError naming a target that cannot be.
    """
    if isinstance(asked, list):
        if not asked:
            raise ValueError(f"target is an empty list, {_EXPECTED}")
        return [target for one in asked for target in parse_targets(one, tokenizer, labels)]
    if isinstance(asked, Tensor):
        return _parse_direction(asked)
    if isinstance(asked, tuple):
        if len(asked) != 2:
            raise ValueError(f"target is a tuple of {len(asked)}, expected a pair: their difference is explained")
        (first, plus), (second, minus) = (_parse_column(one, tokenizer, labels) for one in asked)
        return [Target(f"{first} - {second}", plus, minus)]
    label, plus = _parse_column(asked, tokenizer, labels)
    return [Target(label, plus)]


def _parse_direction(asked: Tensor) -> list[Target]:
    if not asked.is_floating_point() or asked.dim() not in (1, 2) or not asked.numel():
        raise ValueError(
            f"target is a tensor {list(asked.shape)} of {asked.dtype}, expected directions [d] or [K, d] of floats"
        )
    if not asked.isfinite().all():
        raise ValueError("target has entries that are NaN or infinite")
    if asked.dim() == 1:
        return [Target("direction", direction=asked.detach())]
    return [Target(f"direction {number}", direction=row) for number, row in enumerate(asked.detach())]


def _parse_column(asked: Any, tokenizer: Any, labels: Mapping[int, str] | None) -> tuple[str, Column]:
    if isinstance(asked, bool) or not isinstance(asked, int | str):
        raise TypeError(f"target is {asked!r}, {_EXPECTED}")
    if asked == "predicted":
        return "predicted", "predicted"
    if asked == "next":
        if labels is not None:
            raise ValueError("target='next' is the token that comes next; this model's logits are of classes")
        return "next", "next"
    if labels is not None:
        return _find_class(asked, labels)
    if isinstance(asked, int):
        name = tokenizer.decode([asked]) if hasattr(tokenizer, "decode") else None
        return (str(asked) if name is None else name), asked
    return asked, _find_token(asked, tokenizer)


def _find_class(asked: int | str, labels: Mapping[int, str]) -> tuple[str, int]:
    names = ", ".join(f"{number}: {label!r}" for number, label in sorted(labels.items())[:20])
    if isinstance(asked, int):
        if asked not in labels:
            raise ValueError(f"target is class {asked}, but the model has {names}")
        return labels[asked], asked
    for number, label in labels.items():
        if label == asked:
            return label, number
    raise ValueError(f"target is {asked!r}, which is none of the model's classes ({names})")


def _find_token(text: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise ValueError(f"target is the text {text!r}; pass the model's tokenizer as tokenizer=, or a token id")
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer is {tokenizer!r}, expected a transformers tokenizer, which knows tokens by their text"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    exact = tokenizer.get_vocab().get(text)
    if exact is not None:
        return int(exact)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    other = text[1:] if text.startswith(" ") else f" {text}"
    one = tokenizer(other, add_special_tokens=False)["input_ids"]
    hint = f" {other!r} is a single one." if len(one) == 1 else ""
    raise ValueError(
        f"target {text!r} is {len(ids)} tokens ({' '.join(map(repr, pieces))}), expected one: pass the first of them, "
        f"or its id.{hint}"
    )


def parse_position(
    asked: Any, prompt_length: int | None, lengths: Sequence[int], masked: Sequence[Sequence[int]] | None
) -> Positions:
    """Returns which tokens of every sequence are read, of which there are ``lengths`` without padding.

    ``masked``: where each has mask tokens, None: nobody knows. Raises TypeError, ValueError or IndexError.
    """
    if prompt_length is not None and asked != "generated":
        raise ValueError(f"prompt_length={prompt_length!r} is for position='generated', not {asked!r}")
    if isinstance(asked, str):
        return _parse_word(asked, prompt_length, lengths, masked)
    wanted = [asked] if isinstance(asked, int) and not isinstance(asked, bool) else asked
    if isinstance(wanted, Tensor):
        wanted = wanted.tolist()
    if not isinstance(wanted, Sequence) or not all(isinstance(one, int) for one in wanted) or not len(wanted):
        raise TypeError(
            f"position is {asked!r}, expected a number, a range or list of them, 'cls', 'mean', 'mask' or 'generated'"
        )
    for row, length in enumerate(lengths):
        for one in wanted:
            if not -length <= one < length:
                raise IndexError(
                    f"position {one} does not exist in sequence {row}, which has {length} tokens; padding is not read"
                )
    return [[one % length for one in wanted] for length in lengths]


def _parse_word(
    asked: str, prompt_length: int | None, lengths: Sequence[int], masked: Sequence[Sequence[int]] | None
) -> Positions:
    if asked == "cls":
        return [[0] for _ in lengths]
    if asked == "mean":
        return "mean"
    if asked == "mask":
        if masked is None:
            raise ValueError("position='mask' needs the tokenizer, which knows the mask token, and token ids")
        for row, found in enumerate(masked):
            if len(found) != 1:
                raise ValueError(f"position='mask', but sequence {row} has {len(found)} mask tokens; expected one")
        return [list(found) for found in masked]
    if asked == "generated":
        return _parse_generated(prompt_length, lengths)
    raise ValueError(f"unknown position {asked!r}, expected a number, 'cls', 'mean', 'mask' or 'generated'")


def _parse_generated(prompt_length: int | None, lengths: Sequence[int]) -> Positions:
    """The state at token t is read for token t + 1: the first one that was generated is read at the prompt's last."""
    if not isinstance(prompt_length, int) or isinstance(prompt_length, bool):
        raise TypeError(f"position='generated' needs prompt_length=, the tokens of the prompt; got {prompt_length!r}")
    for row, length in enumerate(lengths):
        if not 1 <= prompt_length < length:
            raise ValueError(
                f"prompt_length is {prompt_length}, but sequence {row} has {length} tokens; expected 1 to {length - 1}"
            )
    if len(set(lengths)) > 1:
        raise ValueError(
            f"position='generated' with sequences of {sorted(set(lengths))} tokens; pass those of one length together"
        )
    return [list(range(prompt_length - 1, length - 1)) for length in lengths]


def find_masks(ids: Tensor | None, mask: Tensor, tokenizer: Any) -> list[list[int]] | None:
    """Returns where each sequence of ``ids`` ``[B, T]`` has mask tokens, counted without padding."""
    number = getattr(tokenizer, "mask_token_id", None)
    if ids is None or number is None:
        return None
    return [torch.nonzero(row[real] == number)[:, 0].tolist() for row, real in zip(ids, mask, strict=True)]
