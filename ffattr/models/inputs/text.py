"""Sequences of tokens in a model's inputs: which of them are valid, and what to call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.attention import allows_attention
from ..registry import ModelDescription

__all__ = ["TEXT", "Tokens", "check_rows", "find_text_tokens", "name_ids"]

TEXT = ("input_ids", "inputs_embeds", "src")
"""The arguments of a forward that hold them."""
_PREFIX = "decoder_"


@dataclass(frozen=True)
class Tokens:
    """``mask`` ``[B, T]`` (True: a valid token) and ``tokens`` ``[B][T]``."""

    mask: Tensor
    tokens: list[list[str]]


def find_text_tokens(description: ModelDescription, given: Mapping[str, Any], name: str, tokenizer: Any) -> Tokens:
    """Returns the tokens that ``given[name]`` holds, for the decoder where the name says so.

    Raises TypeError or ValueError where the model could not make sense of it or of its mask.
    """
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    content = given[name]
    batch, length = _read_size(description, name, content)
    _check_dtype(description.base, name, content)
    _check_masks(given, prefix, batch, length)
    mask = _make_token_mask(given, prefix, batch, length, content.device)
    check_rows(mask)
    if name.removeprefix(prefix) == "input_ids":
        _check_vocabulary(description.base, name, content)
    most = description.decoder_positions if prefix else description.max_positions
    if most is not None and length > most and f"{prefix}position_ids" not in given:
        raise ValueError(
            f"{name if prefix else 'inputs'} have {length} tokens, but {type(description.base).__name__} has {most} "
            "learned positions. Cut the text into shorter pieces."
        )
    return Tokens(mask, _name_tokens(content, batch, length, tokenizer))


def _make_token_mask(kwargs: Mapping[str, Any], prefix: str, batch: int, length: int, device: torch.device) -> Tensor:
    """Finds the tokens that are not padding, ``[B, T]``, from the masks a forward is given. Without one, all of them.

    A ready-made ``[B, 1, T, T]`` attention mask leaves out the tokens that may attend to nothing, unless others attend
    to them.
    """
    mask, padding = kwargs.get(f"{prefix}attention_mask"), kwargs.get("src_key_padding_mask")
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        allowed = allows_attention(mask).any(1)
        valid &= allowed.any(-1) | allowed.any(-2)
    elif isinstance(mask, Tensor):
        valid &= mask.bool()
    if isinstance(padding, Tensor):
        valid &= (~padding if padding.dtype == torch.bool else padding > -torch.inf).view(batch, length)
    return valid


def _read_size(description: ModelDescription, name: str, content: Tensor) -> tuple[int, int]:
    """Returns batch size and length of ids ``[B, T]`` or features ``[B, T, d]`` / ``[T, B, d]`` / ``[T, d]``."""
    shape = tuple(content.shape)
    integer = not content.dtype.is_floating_point and not content.dtype.is_complex and content.dtype != torch.bool
    plain = name.removeprefix(_PREFIX)
    if plain == "input_ids" and not integer:
        hint = f' For embeddings pass {{"{name.replace("input_ids", "inputs_embeds")}": ...}}.'
        hint = hint if content.is_floating_point() else ""
        raise TypeError(f"{name} has dtype {content.dtype}, expected integer token ids (torch.long).{hint}")
    if plain == "input_ids" and content.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {content.dtype}, expected token ids of torch.long or int. Use .long().")
    if plain != "input_ids" and not content.is_floating_point() and (plain in TEXT or not integer):
        raise TypeError(f"{name} has dtype {content.dtype}, expected a float tensor [batch, T, width]")
    if integer:
        expected, batch, length = "[batch, T]", *(shape if len(shape) == 2 else (-1, -1))
    elif len(shape) == 2 and plain != "inputs_embeds":
        expected, batch, length = "[T, width]", 1, shape[0]
    else:
        batched = shape[:2] if description.batch_first else shape[1::-1]
        expected, batch, length = "[batch, T, width]", *(batched if len(shape) == 3 else (-1, -1))
    if batch < 0:
        raise ValueError(f"{name} has shape {shape}, expected {expected}")
    if batch == 0 or length == 0:
        raise ValueError(f"{name} has shape {shape}: no tokens. Expected at least one sequence with one token.")
    return batch, length


def _check_dtype(base: nn.Module, name: str, content: Tensor) -> None:
    """Raises TypeError for float64 features of a model that has nothing in float64."""
    if content.dtype != torch.float64 or torch.is_autocast_enabled(content.device.type):
        return
    found = {one.dtype for one in base.parameters() if one.is_floating_point()}
    if found and torch.float64 not in found:
        own = next(one.dtype for one in base.parameters() if one.is_floating_point())
        raise TypeError(f"{name} has dtype {content.dtype}, but the model has {own}. Use .to({own}).")


def _check_masks(given: Mapping[str, Any], prefix: str, batch: int, length: int) -> None:
    padding = given.get("src_key_padding_mask")
    flat = isinstance(padding, Tensor) and given["src"].dim() == 2 if "src" in given else False
    allowed: dict[str, tuple[tuple[int, ...], ...]] = {
        f"{prefix}attention_mask": ((batch, length), *((b, 1, length, length) for b in {1, batch})),
        "src_key_padding_mask": ((length,) if flat else (batch, length),),
    }
    for name, shapes in allowed.items():
        value = given.get(name)
        if isinstance(value, Tensor) and tuple(value.shape) not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {' or '.join(map(str, shapes))} for {batch} "
                f"sequences of {length} tokens"
            )


def check_rows(mask: Any) -> None:
    """Raises ValueError where a row of a mask ``[B, T]`` is all padding."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and not (mask != 0).any(1).all():
        row = int((mask != 0).any(1).logical_not().nonzero()[0])
        raise ValueError(f"batch row {row} is all padding: every entry of its mask says so. Remove the row.")


def _check_vocabulary(base: nn.Module, name: str, ids: Tensor) -> None:
    get: Any = getattr(base, "get_input_embeddings", None)
    try:
        size = getattr(get() if get is not None else None, "num_embeddings", None)
    except NotImplementedError:  # of a tower of several models, or of characters that are hashed
        return
    if size is None:
        return
    bad = (ids < 0) | (ids >= size)
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {token}] is {int(ids[row, token])}, outside the vocabulary of {size} tokens. Is the "
            "tokenizer the model's own?"
        )


def _name_tokens(content: Tensor, batch: int, length: int, tokenizer: Any) -> list[list[str]]:
    if content.is_floating_point():
        return [[str(position) for position in range(length)] for _ in range(batch)]
    return [name_ids(row, tokenizer) for row in content.tolist()]


def name_ids(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Returns what the tokenizer calls token ids; their numbers where there is none that knows.

    A lone surrogate becomes a question mark: no file, nor a table of pandas with pyarrow, takes one. Raises ValueError
    where the tokenizer gives more or fewer names than there are ids.
    """
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    found = ids if convert is None else convert(list(ids))
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(ids):
        count = (
            len(found) if isinstance(found, Sequence) and not isinstance(found, str) else f"a {type(found).__name__}"
        )
        raise ValueError(
            f"{type(tokenizer).__name__}.convert_ids_to_tokens gave {count} for {len(ids)} token ids, expected a list "
            "with the text of each"
        )
    return [str(token).encode("utf-8", "replace").decode() for token in found]
