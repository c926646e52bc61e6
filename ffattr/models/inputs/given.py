"""What a user passed, as a model takes it, where nothing is known of the model: nothing is made up, and nothing left
out that its forward would read. Which tokens it makes is learned from what reaches its first attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.attention import Attention, AttentionWeights, QueryKey, allows_attention
from ..capture.recorder import record_first_attention
from ..capture.run import find_device, list_given_tensors
from ..detection.memory import MEMORY
from ..spec.described import ModelDescription
from .text import Tokens, name_ids

__all__ = ["IGNORED", "find_valid", "learn_tokens", "read_given"]

# Left out silently: targets, what a tokenizer returns besides the model's inputs, and switches that capturing sets.
_TARGETS = ("labels", "next_sentence_label", "start_positions", "end_positions")
_EXTRAS = ("special_tokens_mask", "offset_mapping", "length", "overflowing_tokens", "overflow_to_sample_mapping")
_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
IGNORED = frozenset((*_TARGETS, *_EXTRAS, *_SWITCHES, "num_truncated_tokens"))

_WRITTEN = ("decoder_", "tgt", "trg", "target")  # what begins the arguments of a decoder beside an encoder

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def read_given(base: nn.Module, model: nn.Module, inputs: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Returns keyword arguments for ``base``, the part of ``model`` that is run, made of what a user passed for it.

    A mapping is taken for keyword arguments, those of the head alone left out, or for the one argument of a forward
    that takes a batch; a tensor for the first argument, a tuple or list of them for the first ones, text for what the
    tokenizer makes of it. Raises TypeError or ValueError where it is none of these.
    """
    parameters = inspect.signature(base.forward).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind in _KEYWORD]
    if isinstance(inputs, str) or _is_list_of(inputs, str):
        inputs = _tokenize([inputs] if isinstance(inputs, str) else list(inputs), tokenizer, find_device(base))
    if isinstance(inputs, Mapping):
        return _select_arguments(base, model, parameters, names, inputs)
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, Tensor) for one in given):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}, expected a mapping of tensors, a tensor, a tuple of them, text or "
            "a list of text with a tokenizer"
        )
    if len(given) > len(names):
        raise TypeError(
            f"inputs has {len(given)} tensors, but {type(base).__name__}.forward takes {len(names)} arguments by name; "
            "pass a mapping"
        )
    return dict(zip(names, given, strict=False))


def _is_list_of(inputs: Any, kind: type) -> bool:
    return isinstance(inputs, Sequence) and len(inputs) > 0 and all(isinstance(one, kind) for one in inputs)


def _tokenize(texts: list[str], tokenizer: Any, device: torch.device) -> dict[str, Any]:
    if tokenizer is None:
        raise ValueError(f"inputs is text ({texts[0][:40]!r}); pass the model's tokenizer as tokenizer=")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, expected a transformers tokenizer")
    encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    return {name: value.to(device) for name, value in encoded.items()}


def _select_arguments(
    base: nn.Module,
    model: nn.Module,
    parameters: Mapping[str, inspect.Parameter],
    names: list[str],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Selects the entries that a forward takes; the whole mapping, where it takes one argument and none of them."""
    given = {name: value for name, value in inputs.items() if value is not None}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {name: value for name, value in given.items() if name in names}
    if not known and names and not open_ended:
        return {names[0]: inputs}
    head = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    for name, value in given.items():
        if name in known or name in IGNORED or (name in head and model is not base):
            continue
        if open_ended:
            known[name] = value
        elif name != "attention_mask" and name != "token_type_ids":  # of a tokenizer, which the model has no use for
            raise TypeError(
                f"inputs has {name!r}, which {type(base).__name__}.forward does not take; expected some of "
                f"{', '.join(names)}"
            )
    return {name: value for name, value in known.items() if name not in IGNORED or (name in names and model is base)}


def learn_tokens(description: ModelDescription, given: Mapping[str, Any], tokenizer: Any, stack: str = "") -> Tokens:
    """Learns from the first attention, of a ``stack`` where there are two, which tokens ``[B, T]`` a model makes of its
    inputs, and names them; of a decoder without an encoder's layers, those that it attends to besides.

    Raises `ForwardError` with the model's own words where it does not run on them.
    """
    outside = stack == "encoder" and stack not in description.stacks
    numbers = description.stacks["decoder" if outside else stack] if stack else range(1)
    attention = record_first_attention(description, given, numbers.start, outside)
    batch, _, _, length = attention.shape
    tensors = list_given_tensors(given)
    read = "encoder" in description.stacks or any(name.startswith(_WRITTEN) for name, _ in tensors)
    mask = find_valid(attention)
    ids: Tensor | None = None
    for name, value in tensors:
        if value.shape != (batch, length) or (stack and _find_side(name, read) != stack):
            continue
        if name.endswith("key_padding_mask"):
            mask &= ~value.cpu() if value.dtype == torch.bool else value.cpu() > -torch.inf
        elif "mask" in name:
            mask &= value.cpu() != 0
        elif ids is None and not value.is_floating_point() and value.dtype != torch.bool and "type" not in name:
            ids = value
    names = [[str(place) for place in range(length)]] * batch if ids is None else None
    tokens = names if names is not None else [name_ids(row, tokenizer) for row in _require(ids).tolist()]
    return Tokens(mask.to(find_device(description.base)), [list(row) for row in tokens])


def _find_side(name: str, read: bool) -> str:
    """Returns whose argument it is, an "encoder"'s or a "decoder"'s; where its name does not say, an encoder's where
    there is one to ``read`` it."""
    if name.startswith(MEMORY):
        return "encoder"
    return "encoder" if read and not name.startswith(_WRITTEN) else "decoder"


def _require(ids: Tensor | None) -> Tensor:
    assert ids is not None
    return ids


def find_valid(attention: Attention) -> Tensor:
    """Returns which tokens of the batch ``[B, T]`` any query may attend to: all but padding."""
    batch, _, _, length = attention.shape
    allowed: Tensor | None = None
    if isinstance(attention, AttentionWeights):
        allowed = attention.alpha != 0
    elif isinstance(attention, QueryKey) and attention.mask is not None:
        allowed = allows_attention(attention.mask)
    if allowed is None:
        return torch.ones(batch, length, dtype=torch.bool)
    return allowed.any(1).any(-2).expand(batch, -1).cpu().clone()
