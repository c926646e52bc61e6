"""The loaders of ``benchmarks/paper``: what they read is trained, and in its place."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from ctranslate2_reader import read, whisper_state
from samples import DISC, HEAVY_CHAIN, features, inputs, load
from torch import Tensor
from torch.nn import functional as F

NO_SPEECH = 50361  # what Whisper's English models predict in the first place of a silent recording
START = 50257


@pytest.mark.parametrize(("name", "limit"), [("smollm2", 3.5), ("gemma3", 3.2)])
@torch.no_grad()
def test_a_language_model_predicts_the_next_token(name: str, limit: float) -> None:
    model, ids = load(name).model, inputs(name)["input_ids"]
    embedding = model.get_input_embeddings().weight
    logits = model(input_ids=ids).last_hidden_state[0] @ embedding.T  # both models share it with their output
    assert F.cross_entropy(logits[:-1], ids[0, 1:]) < limit


@torch.no_grad()
def test_antiberty_knows_masked_residues() -> None:
    loaded = load("antiberty")
    ids: Tensor = inputs("antiberty")["input_ids"]
    assert ids.shape == (1, len(HEAVY_CHAIN) + 2)
    places = torch.arange(1, ids.shape[1] - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = loaded.tokenizer.mask_token_id
    logits = loaded.model(input_ids=masked).logits[torch.arange(len(places)), places]
    assert (logits.argmax(-1) == ids[0, places]).float().mean() > 0.9


@torch.no_grad()
def test_dinov2_tells_a_disc_from_its_background() -> None:
    patches = load("dinov2").model(**inputs("dinov2")).last_hidden_state[0, 1:]
    assert patches.shape == (256, 384)
    row, column, radius = DISC
    centres = torch.arange(16) * 14 + 7
    inside = ((centres[:, None] - row) ** 2 + (centres - column) ** 2 < (radius - 14) ** 2).flatten()
    outside = ((centres[:, None] - row) ** 2 + (centres - column) ** 2 > (radius + 14) ** 2).flatten()
    patches = F.normalize(patches - patches.mean(0), dim=-1)
    assert (patches[inside] @ patches[inside].T).mean() > 0.9  # a random model's: 0.3
    assert (patches[inside] @ patches[outside].T).mean() < -0.5


@torch.no_grad()
def test_dinov2s_positions_are_a_grid() -> None:
    """Next to each other in a row: alike. From the end of one row to the start of the next: not."""
    grid = load("dinov2").model.embeddings.position_embeddings[0, 1:].view(37, 37, 384)
    assert (grid[:, 1:] - grid[:, :-1]).norm(dim=-1).max() < 0.5 * (grid[1:, 0] - grid[:-1, -1]).norm(dim=-1).min()


@torch.no_grad()
def test_whisper_hears_silence() -> None:
    start = torch.tensor([[START]])
    logits = load("whisper").model(input_features=features(torch.zeros(5 * 16000)), decoder_input_ids=start).logits
    assert logits[0, -1].softmax(-1)[NO_SPEECH] > 0.9


@torch.no_grad()
def test_whisper_names_what_it_hears() -> None:
    """Trained on subtitles, it describes sounds in parentheses."""
    model, processor = load("whisper")
    ids = [START, processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>")]
    while ids[-1] != processor.tokenizer.eos_token_id and len(ids) < 12:
        given = {"input_features": inputs("whisper")["input_features"], "decoder_input_ids": torch.tensor([ids])}
        ids.append(int(model(**given).logits[0, -1].argmax()))
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == " (beeping)"
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


# ---- CTranslate2's format


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def _file(path: Path, *, version: int = 6, kind: int = 4, end: bytes = b"") -> Path:
    matrix = torch.arange(6, dtype=torch.float16).view(2, 3)
    variable = _text("encoder/layer_0/ffn/linear_0/weight") + struct.pack("<B2IBI", 2, 2, 3, kind, 12)
    scalar = _text("decoder/pre_norm") + struct.pack("<BBIb", 0, 1, 1, 1)
    path.write_bytes(
        struct.pack("<I", version)
        + _text("WhisperSpec")
        + struct.pack("<II", 3, 2)
        + (variable + matrix.numpy().tobytes() + scalar)
        + struct.pack("<I", 1)
        + (_text("again") + _text("decoder/pre_norm") + end)
    )
    return path


def test_read(tmp_path: Path) -> None:
    file = read(_file(tmp_path / "model.bin"))
    assert (file.specification, file.revision) == ("WhisperSpec", 3)
    weight = file.variables.pop("encoder/layer_0/ffn/linear_0/weight")
    assert torch.equal(weight, torch.arange(6, dtype=torch.float16).view(2, 3))
    assert {name: (value.dtype, value.item()) for name, value in file.variables.items()} == {
        "decoder/pre_norm": (torch.int8, 1),
        "again": (torch.int8, 1),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 5}, r"model\.bin is of version 5 .*, expected 6"),
        ({"kind": 9}, r"linear_0/weight is of type 9 and shape \(2, 3\) in 12 bytes"),
        ({"kind": 0}, r"linear_0/weight is of type 0 and shape \(2, 3\) in 12 bytes"),
        ({"end": b"??"}, r"goes on for 2 bytes"),
    ],
    ids=str,
)
def test_a_file_that_is_something_else(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(_file(tmp_path / "model.bin", **changed))


def test_whisper_state_splits_fused_projections() -> None:
    rows = torch.arange(12.0).view(6, 2)
    state = whisper_state({"decoder/layer_2/self_attention/linear_0/weight": rows, "encoder/layer_norm/beta": rows[0]})
    assert list(state) == [f"decoder.layers.2.self_attn.{part}_proj.weight" for part in "qkv"] + [
        "encoder.layer_norm.bias"
    ]
    assert torch.equal(torch.cat(list(state.values())[:3]), rows)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoder/activation", 0, "decoder/activation is 0, expected 3"),
        ("decoder/layer_0/moe/weight", 1, "moe/weight is no part of Whisper, expected one of self_attention/linear_0"),
        ("decoder/layer_0/self_attention/linear_0/bias", [0, 0, 1, 0, 0, 0], r"k_proj\.bias is not zero"),
    ],
)
def test_what_is_not_whisper(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whisper_state({name: torch.tensor(value)})
