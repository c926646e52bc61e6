"""Inputs that cannot be read are left out of a list, with the reason, so that one bad text stops nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import FfattrError
from ...selection import Skipped
from ..registry import resolve
from .given import read_given
from .prepare import prepare_inputs
from .sequences import unify_inputs

__all__ = ["select_readable"]

_NUMBERED = re.compile(r"(?<=^text )0\b|(?<=^conversation )0\b|(?<=^inputs\[)0(?=\])|(?<= at )0(?=, expected)")
"""Where a message about the only one of a list says which one it is."""


def select_readable(model: nn.Module, inputs: Any, tokenizer: Any, on_error: str) -> tuple[Any, list[Skipped]]:
    """Returns the inputs that the model can read and, with ``on_error="skip"``, what is wrong with each of the others.

    Every one is tried alone: it is tokenised, and compared with the model's positions and vocabulary. Raises ValueError
    where none is left, and TypeError where ``inputs`` are no list of texts, conversations or ids.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}, expected 'raise' or 'skip'")
    if on_error == "raise":
        return inputs, []
    items = unify_inputs(inputs)
    if not isinstance(items, list | tuple) or not items or isinstance(items[0], Mapping | int):
        raise TypeError(
            f"on_error='skip' is for a list of texts, conversations or lists of ids, got {str(inputs)[:80]!r}; what is "
            "one input alone is read or not"
        )
    sample = next((item for item in items if isinstance(item, str) and item.strip()), items[0])
    description = resolve(model, lambda base: read_given(base, model, [sample], tokenizer))
    good: list[Any] = []
    skipped: list[Skipped] = []
    for index, item in enumerate(items):
        try:
            prepare_inputs(description, model, [item], tokenizer)
        except (ValueError, TypeError, FfattrError) as error:
            skipped.append(Skipped(index, type(error).__name__, _NUMBERED.sub(str(index), str(error))))
        else:
            good.append(item)
    if not good:
        raise ValueError(f"none of {len(items)} inputs can be read, the first of them: {skipped[0].message}")
    return good, skipped
