"""The trained models, each loaded once, what they are given, and how closely maps have to agree."""

from __future__ import annotations

import functools
from typing import Any

import torch
from models import MODELS, MORE_MODELS, Loaded
from texts import prose
from torch import Tensor

from ffattr.results import Attribution

# The variable domain of an antibody's heavy chain: human germline genes, put together.
HEAVY_CHAIN = (
    "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAKDYWGQGTLVTVSS"
)
DISC = (112, 80, 40)  # row, column, radius in pixels


@functools.cache
def load(name: str) -> Loaded:
    return (MODELS | MORE_MODELS)[name]()


def inputs(name: str) -> dict[str, Any]:
    loaded = load(name)
    if name == "antiberty":
        return dict(loaded.tokenizer(" ".join(HEAVY_CHAIN), return_tensors="pt"))
    if name == "dinov2":
        return dict(loaded.tokenizer(image()))
    if name == "whisper":
        ids = loaded.tokenizer.tokenizer(" A tone comes and goes.", return_tensors="pt")["input_ids"]
        return {"input_features": features(sound()), "decoder_input_ids": ids}
    return prose(loaded)


def image(size: int = 224) -> Tensor:
    """Colours ``[3, size, size]``: a gradient, and on it a disc with stripes."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    picture = torch.stack([rows / size, columns / size, 1 - rows / size])
    row, column, radius = DISC
    disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    stripes = torch.where(columns // 6 % 2 == 0, 0.9, 0.1)
    return torch.where(disc, stripes, picture)


def sound(seconds: float = 4.0, rate: int = 16000) -> Tensor:
    """A tone of 440 Hz that is on every other half second, under noise; ``[samples]``."""
    time = torch.arange(int(seconds * rate)) / rate
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.3 * torch.sin(2 * torch.pi * 440 * time) * (time % 1 < 0.5) + 0.02 * noise


def features(wave: Tensor) -> Tensor:
    """Whisper's ``input_features``; ``[1, 80, 3000]``, thirty seconds whatever the length of the sound."""
    found: Tensor = load("whisper").tokenizer(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    return found


def assert_agree(found: Attribution, expected: Attribution) -> None:
    """Every number of every map to four digits, unless its square is no float32."""
    assert found.scopes == expected.scopes
    for scope in found.scopes:
        torch.testing.assert_close(found.maps[scope].double(), expected.maps[scope].double(), rtol=1e-4, atol=1e-18)
