"""Something to read for a model of which only the name is given: a sentence, a picture or a tone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pretrained import load_processor

__all__ = ["Example", "make_example"]

_SENTENCE = "The cat that sat on the mat saw two birds, and none of them saw the cat."
_WRITTEN = 8
"""Tokens that a decoder reads."""


@dataclass(frozen=True)
class Example:
    """``inputs`` and ``tokenizer`` as `ffattr.attribute` takes them, and what they are, in words.

    ``written`` is what a decoder with an encoder reads, in words.
    """

    inputs: Any
    tokenizer: Any
    words: str
    written: str = ""


def make_example(model: Any, name: str, text: str | None = None) -> Example:
    """Makes an input for ``model``, which was loaded from ``name``: ``text`` where it reads text.

    Raises ValueError for text where none is read and for a model of other inputs, OSError where what makes the input
    is missing.
    """
    takes = str(model.main_input_name)
    if takes == "input_ids":
        tokenizer = load_processor(name, takes)
        text = _SENTENCE if text is None else text
        if not tokenizer(text)["input_ids"]:
            raise ValueError(f"the tokenizer of {name!r} makes no tokens of {text!r}; was it saved with the model?")
        if not model.config.is_encoder_decoder:
            return Example(text, tokenizer, f'"{text}"')
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        return _with_decoder(model, {takes: ids}, tokenizer, f'"{text}"')
    if text is not None:
        raise ValueError(f"{name!r} takes {takes}, not text: leave out {text[:40]!r}")
    made, words = _draw_picture(model, name) if takes == "pixel_values" else _make_tone(name, takes)
    given = {takes: made.to(model.device, model.dtype)}
    if model.config.is_encoder_decoder:
        return _with_decoder(model, given, None, words)
    return Example(given, None, words)


def _with_decoder(model: Any, given: dict[str, Tensor], tokenizer: Any, words: str) -> Example:
    """Adds what the decoder reads, which is what the model itself writes, each time the likeliest token."""
    names = ("decoder_start_token_id", "bos_token_id")
    start = next((token for name in names if (token := getattr(model.config, name, None)) is not None), 0)
    ids = torch.tensor([[start]], device=model.device)
    if model.get_output_embeddings() is None:
        return Example({**given, "decoder_input_ids": ids}, tokenizer, words, f"its start token, {start}")
    with torch.no_grad():
        states = model.get_encoder()(**given)
        while ids.shape[1] < _WRITTEN:
            logits = model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    written = f"its start token, {start}, and {_WRITTEN - 1} of the model's own by greedy decoding"
    return Example({**given, "decoder_input_ids": ids}, tokenizer, words, written)


def _draw_picture(model: Any, name: str) -> tuple[Tensor, str]:
    """Draws colours that run into each other with stripes across, ``[1, C, H, W]``."""
    channels = int(getattr(model.config, "num_channels", 3))
    size: Any = getattr(model.config, "image_size", None)
    try:
        processor = load_processor(name, "pixel_values") if channels == 3 else None
    except OSError:
        processor = None
    if processor is not None:
        image = (255 * _draw_colours(256, 256, 3)).astype(np.uint8)
        made = processor(images=image, return_tensors="pt")["pixel_values"]
        how = "by the model's image processor"
    elif size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        made = torch.from_numpy(2 * _draw_colours(height, width, channels) - 1).permute(2, 0, 1)[None]
        how = "of the size in its configuration"
    else:
        raise OSError(f"{name!r} has neither an image processor nor an image_size in its configuration")
    return made, f"a generated picture, {list(made.shape[1:])}, {how}"


def _draw_colours(height: int, width: int, channels: int) -> Any:
    """Returns numbers from 0 to 1, ``[height, width, channels]``."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    stripes = 0.5 + 0.5 * np.sin(40 * (rows + 2 * columns))
    return np.stack([(rows, columns, stripes)[channel % 3] for channel in range(channels)], -1)


def _make_tone(name: str, takes: str) -> tuple[Tensor, str]:
    """Makes a second of 440 Hz that grows louder."""
    extractor = load_processor(name, takes)
    rate = int(extractor.sampling_rate)
    time = np.arange(rate) / rate
    wave = (0.5 * time * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    made = extractor(wave, sampling_rate=rate, return_tensors="pt")[takes]
    return made, f"a generated tone, {list(made.shape[1:])}, by the model's feature extractor"
