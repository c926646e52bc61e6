"""Texts, lists of token ids and conversations: tokenised where they are not yet, and padded side by side."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.run import find_device
from ..registry import ModelDescription

__all__ = ["SPANS", "as_texts", "encode_sequences", "pad_rows", "unify_inputs"]

Row = dict[str, list[Any]]
"""What a tokenizer makes of one sequence: ``input_ids`` ``[T]``, what else the model takes, as long, and `SPANS`."""

SPANS = "characters"
"""Which characters of its text each token was made of, ``(start, stop)``, where a fast tokenizer tells."""


def unify_inputs(inputs: Any) -> Any:
    """Returns numbers of an array as a tensor, and its texts, or those of a column of pandas, as a list."""
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "iufb":
        return torch.from_numpy(np.ascontiguousarray(inputs))
    column = hasattr(inputs, "tolist") and hasattr(inputs, "dtype") and not isinstance(inputs, (Tensor, Mapping))
    return inputs.tolist() if column else inputs


def as_texts(inputs: Any) -> list[str] | None:
    """Returns the texts that a user passed as inputs; None if it is something else."""
    inputs = unify_inputs(inputs)
    if isinstance(inputs, str):
        return [inputs]
    texts = isinstance(inputs, Sequence) and len(inputs) > 0 and all(isinstance(text, str) for text in inputs)
    return list(inputs) if texts else None


def encode_sequences(inputs: Any, tokenizer: Any, ignored: frozenset[str]) -> list[Row] | None:
    """Returns a `Row` for each text, list of ids or conversation; None if ``inputs`` is something else.

    A conversation is a list of messages with ``role`` and ``content``, which the tokenizer's chat template makes into
    one sequence. What the tokenizer returns besides is left out where it is ``ignored``. Raises TypeError or ValueError
    for one without tokens, a list of several kinds of things, and where the tokenizer is missing or has no template.
    """
    texts = as_texts(inputs)
    if texts is not None:
        _require_tokenizer(tokenizer, f"text ({texts[0][:40]!r})")
        encoded = [_encode_text(row, text, tokenizer) for row, text in enumerate(texts)]
    elif isinstance(inputs, Sequence) and len(inputs) and not isinstance(inputs, (str, bytes)):
        encoded = _encode_items(list(inputs), tokenizer)
    else:
        return None
    return [{name: list(value) for name, value in row.items() if name not in ignored} for row in encoded]


def pad_rows(description: ModelDescription, rows: list[Row], tokenizer: Any) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Returns what the model takes, padded on the right, and how long each sequence is.

    Raises TypeError for a sequence of which the tokenizer did not say as much of every token.
    """
    lengths = tuple(len(row["input_ids"]) for row in rows)
    longest = max(lengths)
    pad = next((i for name in ("pad_token_id", "eos_token_id") if (i := getattr(tokenizer, name, None)) is not None), 0)
    padding = {"input_ids": pad, "token_type_ids": getattr(tokenizer, "pad_token_type_id", None) or 0}
    device = find_device(description.base)
    for row in rows:
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))

    def pad_column(name: str) -> Tensor:
        fill = padding.get(name, 0)
        for number, row in enumerate(rows):
            if len(row.get(name, ())) != lengths[number]:
                raise TypeError(
                    f"{type(tokenizer).__name__} returned {len(row.get(name, ()))} {name} for {lengths[number]} "
                    f"input_ids of sequence {number}, expected as many"
                )
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows], device=device)

    parameters = inspect.signature(description.base.forward).parameters
    return {name: pad_column(name) for name in rows[0] if name in parameters}, lengths


def _require_tokenizer(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ValueError(f"inputs is {what}; pass the model's tokenizer as tokenizer=")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, expected a transformers tokenizer")


def _encode_text(row: int, text: str, tokenizer: Any) -> Mapping[str, Any]:
    returned = tokenizer(text)
    encoded = _require_ids(returned, f"{type(tokenizer).__name__}({text[:40]!r})")
    # Special tokens alone ([CLS] [SEP]) are no tokens of the text.
    if not text.strip() or not len(encoded["input_ids"]):
        raise ValueError(f"text {row} ({text!r}) has no tokens; expected at least one. Remove it.")
    known = getattr(returned, "encodings", None)  # of a fast tokenizer
    return encoded if not known else {**encoded, SPANS: known[0].offsets}


def _encode_items(items: list[Any], tokenizer: Any) -> list[Mapping[str, Any]]:
    """Returns what there is of each item: a list of ids, a message (all are one conversation) or a conversation."""
    first = items[0]
    if isinstance(first, Mapping):
        return [_encode_chat(0, items, tokenizer)]
    if _is_id(first):
        items = [items]
    encoded: list[Mapping[str, Any]] = []
    for row, item in enumerate(items):
        found = item.tolist() if isinstance(item, (np.ndarray, Tensor)) else item
        if isinstance(found, (str, bytes)) or not isinstance(found, Sequence):
            raise TypeError(
                f"inputs is a list with {item!r} at {row}, expected all of it to be texts, lists of token ids or "
                "conversations"
            )
        if len(found) == 0:
            raise ValueError(f"inputs[{row}] has no tokens; expected at least one. Remove it.")
        if isinstance(found[0], Mapping):
            encoded.append(_encode_chat(row, found, tokenizer))
            continue
        wrong = next((one for one in found if not _is_id(one)), None)
        if wrong is not None:
            raise TypeError(f"inputs[{row}] has {wrong!r} among its token ids, expected integers")
        encoded.append({"input_ids": [int(one) for one in found]})
    return encoded


def _encode_chat(row: int, messages: Sequence[Any], tokenizer: Any) -> Mapping[str, Any]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(f"conversation {row} has {message!r}, expected messages with 'role' and 'content'")
    _require_tokenizer(tokenizer, f"a conversation ({messages[0]!r})")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"inputs is a conversation, but {type(tokenizer).__name__} has no chat_template: set one, or pass text"
        )
    encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)
    return _require_ids(encoded, f"{type(tokenizer).__name__}.apply_chat_template")


def _require_ids(encoded: Any, what: str) -> Mapping[str, Any]:
    """Returns what a tokenizer made of one sequence. Raises TypeError where this is no mapping with a list of ids."""
    ids = encoded.get("input_ids") if isinstance(encoded, Mapping) else None
    ids = ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else ids
    if not isinstance(ids, Sequence) or not all(map(_is_id, ids)):
        found = f"a {type(encoded).__name__}" if ids is None else f"input_ids {str(ids)[:80]}"
        raise TypeError(f"{what} returned {found}, expected a mapping whose 'input_ids' are a list of integers")
    others = {name: values for name, values in encoded.items() if hasattr(values, "__len__")}
    return {**others, "input_ids": ids}


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
