"""What a user passes in, made into what a model's forward takes: keyword arguments, valid tokens, token strings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModel
from ..capture.run import find_device
from ..registry import ModelDescription
from .decoder_ids import learn_decoder_ids
from .given import IGNORED, learn_tokens, read_given
from .labels import label_texts
from .sequences import SPANS, Row, as_texts, encode_sequences, pad_rows, unify_inputs
from .signals import SIGNALS, check_signal, find_signal_tokens
from .text import TEXT, Tokens, check_rows, find_text_tokens

__all__ = ["Inputs", "prepare_inputs"]

_CONTENT = (*TEXT, *SIGNALS)
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Inputs:
    """``kwargs`` for the base model's forward, ``mask`` ``[B, T]`` (True: a valid token), ``tokens`` ``[B][T]``.

    Of a model with an encoder and a decoder the latter two are the decoder's, and the other's are in ``encoder``.
    ``labels`` ``[B][T]`` are the tokens as the text has them, None: as ``tokens``.
    ``lengths`` ``[B]`` of sequences made from lists (texts, ids), which are padded on the right; None for all others.
    """

    kwargs: dict[str, Any]
    mask: Tensor
    tokens: list[list[str]]
    encoder: Tokens | None = None
    lengths: tuple[int, ...] | None = None
    labels: list[list[str]] | None = None

    def split_batches(self, limit: int) -> list[tuple[list[int], Inputs]]:
        """Splits the inputs into batches of about the same length: which of the sequences, and these alone.

        A batch has at most ``limit`` tokens, padding included, but at least one sequence; the longest come first. Only
        lists can be cut apart: of tensors that were given, nobody knows what their first axis means to the model.
        """
        if self.lengths is None:
            return [(list(range(len(self.mask))), self)]
        cut: list[list[int]] = []
        for row in sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True):
            if cut and self.lengths[cut[-1][0]] * (len(cut[-1]) + 1) <= limit:
                cut[-1].append(row)
            else:
                cut.append([row])
        return [(sorted(rows), self._select_rows(sorted(rows))) for rows in cut]

    def _select_rows(self, rows: list[int]) -> Inputs:
        """Returns these sequences, without the padding that none of them needs."""
        assert self.lengths is not None
        lengths = tuple(self.lengths[row] for row in rows)
        kwargs = {name: value[rows, : max(lengths)] for name, value in self.kwargs.items()}
        tokens = [self.tokens[row][: max(lengths)] for row in rows]
        return Inputs(kwargs, self.mask[rows, : max(lengths)], tokens, lengths=lengths)


def prepare_inputs(description: ModelDescription, model: nn.Module, inputs: Any, tokenizer: Any = None) -> Inputs:
    """Check ``inputs`` against the model and bring them into one form.

    Sequences (`encode_sequences`) are padded on the right whatever the tokenizer's own side, so that learned positions
    are those of the text on its own. Padding of mappings is taken as given.
    """
    if description.learned:
        prepare = _prepare_learned_sides if description.stacks else _prepare_learned
        return prepare(description, model, inputs, tokenizer)
    parameters = inspect.signature(description.base.forward).parameters
    first = next(iter(parameters))  # input_ids, src, pixel_values
    inputs, lengths = unify_inputs(inputs), None
    tensors = isinstance(inputs, tuple) and all(isinstance(one, Tensor) and one.dim() > 1 for one in inputs)
    if tensors and 0 < len(inputs) <= len(parameters):
        inputs = dict(zip(parameters, inputs, strict=False))  # as they would be passed to the model
    rows = _encode_for(description, inputs, tokenizer)
    if rows is not None:
        given, lengths = pad_rows(description, rows, tokenizer)
    elif isinstance(inputs, Mapping):
        given = _select_known(description, model, inputs)
    elif isinstance(inputs, Tensor):
        given = {first: inputs[None] if _takes_ids(description) and inputs.dim() == 1 else inputs}
    else:
        raise TypeError(
            f"inputs is a {type(inputs).__name__}, expected a mapping of tensors, "
            + (
                "a tensor of ids [batch, T] or lists of ids, or texts or conversations with a tokenizer"
                if _takes_ids(description)
                else f"or a float tensor {first}"
            )
        )
    name = next((name for name in (*_CONTENT, first) if name in given), None)
    if name is None:
        raise ValueError(f"inputs has {sorted(given) or 'nothing'}, expected {first!r} among its keys")
    if description.stacks:
        _add_decoder(description.base, model, inputs, given)
    if name in SIGNALS:
        check_signal(description, name, given)
    _check_device(description.base, given)
    decoder = None
    if description.stacks:
        part = next(name for name in _DECODER if name in given)
        decoder = find_text_tokens(description, given, part, tokenizer)
    if name in SIGNALS:
        check_rows(given.get("attention_mask"))
        found = Tokens(*find_signal_tokens(description, name, given))
    else:
        found = find_text_tokens(description, given, name, tokenizer)
    if decoder is None:
        return Inputs(given, found.mask, found.tokens, lengths=lengths, labels=_label_inputs(found, inputs, rows))
    if len(decoder.mask) != len(found.mask):
        raise ValueError(
            f"inputs have {len(found.mask)} sequences for the encoder and {len(decoder.mask)} for the decoder; "
            "expected as many"
        )
    return Inputs(given, decoder.mask, decoder.tokens, found)


def _prepare_learned(description: ModelDescription, model: nn.Module, inputs: Any, tokenizer: Any) -> Inputs:
    """Takes inputs as they are, and learns from the model which tokens it makes of them."""
    lengths = None
    rows = _encode_for(description, inputs, tokenizer) if as_texts(inputs) is not None else None
    if rows is not None:
        given, lengths = pad_rows(description, rows, tokenizer)
    else:
        given = read_given(description.base, model, inputs, tokenizer)
    _check_device(description.base, given)
    name = next((name for name in TEXT if isinstance(given.get(name), Tensor)), None)
    if name is not None:  # whatever is wrong with them is said before the model stumbles over it
        find_text_tokens(description, given, name, tokenizer)
    found = learn_tokens(description, given, tokenizer)
    check_rows(found.mask)
    whole = lengths is not None and found.mask.shape == given["input_ids"].shape
    labels = _label_inputs(found, inputs, rows) if whole else None
    return Inputs(given, found.mask, found.tokens, lengths=lengths if whole else None, labels=labels)


def _prepare_learned_sides(description: ModelDescription, model: nn.Module, inputs: Any, tokenizer: Any) -> Inputs:
    """Does the same of a model with an encoder and a decoder, or of a decoder that attends to what it is given."""
    given = read_given(description.base, model, inputs, tokenizer)
    _check_device(description.base, given)
    if _takes_decoder_ids(description):
        _add_decoder(description.base, model, inputs, given)
    encoder, decoder = (learn_tokens(description, given, tokenizer, stack) for stack in ("encoder", "decoder"))
    for found in (encoder, decoder):
        check_rows(found.mask)
    return Inputs(given, decoder.mask, decoder.tokens, encoder)


def _label_inputs(found: Tokens, inputs: Any, rows: list[Row] | None) -> list[list[str]] | None:
    """Returns the tokens as the texts have them that a user passed; None where these say the same or there are none."""
    return None if rows is None else label_texts(found.tokens, as_texts(inputs), [row.get(SPANS) for row in rows])


def _add_decoder(base: nn.Module, model: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
    """See that there is something for the decoder to read: what is given, the labels, moved on by one, or what the
    model itself has its decoder read."""
    if any(name in given for name in _DECODER):
        return
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is None or shift is None:
        ids = learn_decoder_ids(base, model, inputs if isinstance(inputs, Mapping) else given)
        if ids is not None:
            given["decoder_input_ids"] = ids
            return
        raise ValueError(
            "inputs has no 'decoder_input_ids', the tokens that the decoder reads. Pass what model.generate returned, "
            "or those of a target text after the token that the decoder starts with."
        )
    given["decoder_input_ids"] = shift(labels=labels)


def _encode_for(description: ModelDescription, inputs: Any, tokenizer: Any) -> list[Row] | None:
    """Returns what there is of each sequence; None where ``inputs`` are none."""
    if _takes_ids(description):
        return encode_sequences(inputs, tokenizer, IGNORED)
    texts = as_texts(inputs)
    if texts is not None:
        raise TypeError(
            f"{type(description.base).__name__} takes a float tensor of features, not text: {texts[0][:40]!r}"
        )
    return None


def _takes_decoder_ids(description: ModelDescription) -> bool:
    parameters = inspect.signature(description.base.forward).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return any(name in parameters for name in _DECODER) or (open_ended and "encoder" in description.stacks)


def _takes_ids(description: ModelDescription) -> bool:
    return "input_ids" in inspect.signature(description.base.forward).parameters


def _select_known(description: ModelDescription, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the entries that the base model's forward takes, without targets and without arguments of the head."""
    parameters = inspect.signature(description.base.forward).parameters
    head = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {}
    for name, value in inputs.items():
        if value is None or name in IGNORED:
            continue
        if name in ("past_key_values", "cache_params"):
            raise ValueError(
                f"inputs has {name!r}: a cache hides the earlier tokens from the decomposition. Pass the whole "
                "sequence as input_ids, without it."
            )
        if name == "encoder_outputs" and description.stacks:
            raise ValueError(
                "inputs has 'encoder_outputs', which leave out the encoder's layers. Pass what the encoder reads."
            )
        if name.startswith("encoder_"):
            raise UnsupportedModel(
                f"inputs has {name!r}, but no layer of {type(description.base).__name__} attends to an encoder's "
                "tokens (config.add_cross_attention is not set). Leave it out."
            )
        if name not in parameters and name in head:
            continue
        if name not in parameters and (not open_ended or name in (*_CONTENT, "attention_mask")):
            raise TypeError(
                f"inputs has {name!r}, which {type(description.base).__name__}.forward does not take; expected some of "
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


def _check_device(base: nn.Module, given: Mapping[str, Any]) -> None:
    if any("_hf_hook" in module.__dict__ for module in base.modules()):  # accelerate moves inputs by itself
        return
    device = find_device(base)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} is on {value.device}, but the model is on {device}. Use .to({str(device)!r}).")
