"""Something to read for a model of which only the name is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from recording import state
from saved_models import save_model
from tiny_models import build

from ffattr.models import examples, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random model, or the one given, with what makes its inputs."""
    return partial(save_model, tmp_path_factory.mktemp("models"))


def test_decoding_is_the_models_own(saved: Callable[..., Path]) -> None:
    folder = saved("bart-lm", build("bart", head="ForConditionalGeneration", dtype=torch.float32))
    model = pretrained.load_model(str(folder))
    before = state(model)
    made = examples.make_example(model, str(folder), "the cat sat").inputs
    assert state(model) == before
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    expected = model.generate(made["input_ids"], max_new_tokens=7, do_sample=False, num_beams=1)
    assert torch.equal(made["decoder_input_ids"], expected)


def test_decoder_without_a_head(monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Path]) -> None:
    folder = str(saved("bart"))
    made = examples.make_example(build("bart", dtype=torch.float32), folder)
    assert made.inputs["decoder_input_ids"].tolist() == [[2]]
    assert made.written == "its start token, 2"


def test_pictures_and_text() -> None:
    model = build("siglip-vision", dtype=torch.float32)
    made = examples.make_example(model, "nowhere/at-all")
    assert made.inputs["pixel_values"].shape == (1, 3, 12, 12)
    assert made.words == "a generated picture, [3, 12, 12], of the size in its configuration"
    with pytest.raises(ValueError, match="takes pixel_values, not text: leave out 'a cat'"):
        examples.make_example(model, "nowhere/at-all", "a cat")
