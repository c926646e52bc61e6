"""From what a user passes in to what a model's forward takes: keyword arguments, valid tokens, token strings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapted
from .errors import UnsupportedModel
from .signals import SIGNALS, check_signal, signal_tokens

__all__ = ["Inputs", "Tokens", "prepare"]

# Left out silently: targets, what a tokenizer returns besides the model's inputs, and switches that capturing sets.
_TARGETS = ("labels", "next_sentence_label", "start_positions", "end_positions")
_EXTRAS = ("special_tokens_mask", "offset_mapping", "length", "overflowing_tokens", "overflow_to_sample_mapping")
_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
_IGNORED = frozenset((*_TARGETS, *_EXTRAS, *_SWITCHES, "num_truncated_tokens"))
_TEXT = ("input_ids", "inputs_embeds", "src")
_CONTENT = (*_TEXT, *SIGNALS)


@dataclass(frozen=True)
class Tokens:
    """``mask`` ``[B, T]`` (True: a valid token) and ``tokens`` ``[B][T]``."""

    mask: Tensor
    tokens: list[list[str]]


@dataclass(frozen=True)
class Inputs:
    """``kwargs`` for the base model's forward, ``mask`` ``[B, T]`` (True: a valid token), ``tokens`` ``[B][T]``.

    Of a model with an encoder and a decoder the latter two are the decoder's, and the other's are in ``encoder``.
    """

    kwargs: dict[str, Any]
    mask: Tensor
    tokens: list[list[str]]
    encoder: Tokens | None = None


def prepare(adapted: Adapted, model: nn.Module, inputs: Any, tokenizer: Any = None) -> Inputs:
    """Check ``inputs`` against the model and bring them into one form.

    Text is padded on the right whatever the tokenizer's own side, so that learned positions are those of the text on
    its own. Padding of mappings is taken as given.
    """
    parameters = inspect.signature(adapted.base.forward).parameters
    first = next(iter(parameters))  # input_ids, src, pixel_values
    if isinstance(inputs, str) or _is_texts(inputs):
        given = _encode(adapted, [inputs] if isinstance(inputs, str) else list(inputs), tokenizer)
    elif isinstance(inputs, Mapping):
        given = _known(adapted, model, inputs)
    elif isinstance(inputs, Tensor):
        given = {first: inputs[None] if _takes_ids(adapted) and inputs.dim() == 1 else inputs}
    else:
        raise TypeError(
            f"inputs is a {type(inputs).__name__}, expected a mapping of tensors, "
            + (
                "a tensor of ids [batch, T], text or a list of text with a tokenizer"
                if _takes_ids(adapted)
                else f"or a float tensor {first}"
            )
        )
    name = next((name for name in (*_CONTENT, first) if name in given), None)
    if name is None:
        raise ValueError(f"inputs has {sorted(given) or 'nothing'}, expected {first!r} among its keys")
    content = given[name]
    if name in SIGNALS:
        check_signal(adapted, name, given)
        _check_device(adapted.base, given)
        _check_rows(given.get("attention_mask"))
        mask, tokens = signal_tokens(adapted, name, given)
        return Inputs(given, mask, tokens)
    batch, length = _size(adapted, name, content)
    _check_device(adapted.base, given)
    _check_masks(adapted, given, batch, length)
    mask = _token_mask(given, batch, length, content.device)
    _check_rows(mask)
    if name == "input_ids":
        _check_vocabulary(adapted.base, content)
    if adapted.max_positions is not None and length > adapted.max_positions and "position_ids" not in given:
        raise ValueError(
            f"inputs have {length} tokens, but {type(adapted.base).__name__} has {adapted.max_positions} learned "
            "positions. Cut the text into shorter pieces."
        )
    return Inputs(given, mask, _tokens(content, batch, length, tokenizer))


def _token_mask(kwargs: Mapping[str, Any], batch: int, length: int, device: torch.device) -> Tensor:
    """Which tokens are not padding, ``[B, T]``, from the masks a forward is given. Without one, all of them.

    A ready-made ``[B, 1, T, T]`` attention mask leaves out the tokens that may attend to nothing.
    """
    mask, padding = kwargs.get("attention_mask"), kwargs.get("src_key_padding_mask")
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        valid &= (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(-1).any(1)
    elif isinstance(mask, Tensor):
        valid &= mask.bool()
    if isinstance(padding, Tensor):
        valid &= (~padding if padding.dtype == torch.bool else padding > -torch.inf).view(batch, length)
    return valid


def _is_texts(inputs: Any) -> bool:
    return isinstance(inputs, Sequence) and len(inputs) > 0 and all(isinstance(text, str) for text in inputs)


def _takes_ids(adapted: Adapted) -> bool:
    return "input_ids" in inspect.signature(adapted.base.forward).parameters


def _encode(adapted: Adapted, texts: list[str], tokenizer: Any) -> dict[str, Any]:
    if not _takes_ids(adapted):
        raise TypeError(f"{type(adapted.base).__name__} takes a float tensor of features, not text: {texts[0][:40]!r}")
    if tokenizer is None:
        raise ValueError(f"inputs is text ({texts[0][:40]!r}); pass the model's tokenizer as tokenizer=")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, expected a transformers tokenizer")
    rows = []
    for row, text in enumerate(texts):
        encoded = tokenizer(text)
        # Special tokens alone ([CLS] [SEP]) are no tokens of the text.
        if not text.strip() or not len(encoded["input_ids"]):
            raise ValueError(f"text {row} ({text!r}) has no tokens; expected at least one. Remove it.")
        rows.append({name: list(value) for name, value in encoded.items() if name not in _IGNORED})
    longest = max(len(row["input_ids"]) for row in rows)
    pad = next((i for name in ("pad_token_id", "eos_token_id") if (i := getattr(tokenizer, name, None)) is not None), 0)
    padding = {"input_ids": pad, "token_type_ids": getattr(tokenizer, "pad_token_type_id", None) or 0}
    device = _device(adapted.base)
    for row_values in rows:
        row_values.setdefault("attention_mask", [1] * len(row_values["input_ids"]))

    def column(name: str) -> Tensor:
        fill = padding.get(name, 0)
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows], device=device)

    parameters = inspect.signature(adapted.base.forward).parameters
    return {name: column(name) for name in rows[0] if name in parameters}


def _known(adapted: Adapted, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the base model's forward takes, without targets and without arguments of the head."""
    parameters = inspect.signature(adapted.base.forward).parameters
    head = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {}
    for name, value in inputs.items():
        if value is None or name in _IGNORED:
            continue
        if name in ("past_key_values", "cache_params"):
            raise ValueError(
                f"inputs has {name!r}: a cache hides the earlier tokens from the decomposition. Pass the whole "
                "sequence as input_ids, without it."
            )
        if name.startswith("encoder_"):
            raise UnsupportedModel(f"inputs has {name!r}: cross-attention is not covered, only self-attention layers")
        if name not in parameters and name in head:
            continue
        if name not in parameters and (not open_ended or name in (*_CONTENT, "attention_mask")):
            raise TypeError(
                f"inputs has {name!r}, which {type(adapted.base).__name__}.forward does not take; expected some of "
                f"{', '.join(parameters)}"
            )
        if not isinstance(value, (Tensor, bool)):
            raise TypeError(
                f"inputs[{name!r}] is a {type(value).__name__}, expected a tensor. With a tokenizer or a processor, "
                'pass return_tensors="pt".'
            )
        given[name] = value
    if "input_ids" in given and "inputs_embeds" in given:
        raise ValueError("inputs has both 'input_ids' and 'inputs_embeds'; expected one of them")
    return given


def _size(adapted: Adapted, name: str, content: Tensor) -> tuple[int, int]:
    """Batch size and number of tokens, of ids ``[B, T]`` or features ``[B, T, d]`` / ``[T, B, d]`` / ``[T, d]``."""
    shape = tuple(content.shape)
    integer = not content.dtype.is_floating_point and not content.dtype.is_complex and content.dtype != torch.bool
    if name == "input_ids" and not integer:
        hint = ' For embeddings pass {"inputs_embeds": ...}.' if content.is_floating_point() else ""
        raise TypeError(f"input_ids has dtype {content.dtype}, expected integer token ids (torch.long).{hint}")
    if name != "input_ids" and not content.is_floating_point() and (name in _TEXT or not integer):
        raise TypeError(f"{name} has dtype {content.dtype}, expected a float tensor [batch, T, width]")
    if integer:
        expected, batch, length = "[batch, T]", *(shape if len(shape) == 2 else (-1, -1))
    elif len(shape) == 2 and name != "inputs_embeds":
        expected, batch, length = "[T, width]", 1, shape[0]
    else:
        batched = shape[:2] if adapted.batch_first else shape[1::-1]
        expected, batch, length = "[batch, T, width]", *(batched if len(shape) == 3 else (-1, -1))
    if batch < 0:
        raise ValueError(f"{name} has shape {shape}, expected {expected}")
    if batch == 0 or length == 0:
        raise ValueError(f"{name} has shape {shape}: no tokens. Expected at least one sequence with one token.")
    return batch, length


def _device(base: nn.Module) -> torch.device:
    """Where the first parameter lies; the CPU for weights that accelerate brings in when needed."""
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _check_device(base: nn.Module, given: Mapping[str, Any]) -> None:
    if any(hasattr(module, "_hf_hook") for module in base.modules()):  # accelerate moves inputs by itself
        return
    device = _device(base)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} is on {value.device}, but the model is on {device}. Use .to({str(device)!r}).")


def _check_masks(adapted: Adapted, given: Mapping[str, Any], batch: int, length: int) -> None:
    padding = given.get("src_key_padding_mask")
    flat = isinstance(padding, Tensor) and given["src"].dim() == 2 if "src" in given else False
    allowed: dict[str, tuple[tuple[int, ...], ...]] = {
        "attention_mask": ((batch, length), *((b, 1, length, length) for b in {1, batch})),
        "src_key_padding_mask": ((length,) if flat else (batch, length),),
    }
    for name, shapes in allowed.items():
        value = given.get(name)
        if isinstance(value, Tensor) and tuple(value.shape) not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {' or '.join(map(str, shapes))} for {batch} "
                f"sequences of {length} tokens"
            )


def _check_rows(mask: Any) -> None:
    """No row of a mask ``[B, T]`` may be all padding."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and not (mask != 0).any(1).all():
        row = int((mask != 0).any(1).logical_not().nonzero()[0])
        raise ValueError(f"batch row {row} is all padding: every entry of its mask says so. Remove the row.")


def _check_vocabulary(base: nn.Module, ids: Tensor) -> None:
    get: Any = getattr(base, "get_input_embeddings", None)
    size = getattr(get() if get is not None else None, "num_embeddings", None)
    if size is None:
        return
    bad = (ids < 0) | (ids >= size)
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {token}] is {int(ids[row, token])}, outside the vocabulary of {size} tokens. Is the "
            "tokenizer the model's own?"
        )


def _tokens(content: Tensor, batch: int, length: int, tokenizer: Any) -> list[list[str]]:
    if content.is_floating_point():
        return [[str(position) for position in range(length)] for _ in range(batch)]
    rows = content.tolist()
    if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [[str(token) for token in row] for row in rows]
    return [[str(token) for token in tokenizer.convert_ids_to_tokens(row)] for row in rows]
