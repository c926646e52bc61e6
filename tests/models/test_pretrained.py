"""Models and what makes their inputs, from folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from saved_models import save_model
from tiny_models import build

from ffattr.models import pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random model, or the one given, with what makes its inputs."""
    return partial(save_model, tmp_path_factory.mktemp("models"))


def test_a_model_with_its_tokenizer(saved: Callable[..., Path]) -> None:
    model, tokenizer = pretrained.load(str(saved("bert")))
    assert type(model).__name__ == "BertModel"
    assert (model.training, model.dtype) == (False, torch.float32)
    assert tokenizer("the cat")["input_ids"] == [5, 6]
    assert pretrained.load_model(str(saved("bert")), torch.float64).dtype == torch.float64


def test_a_model_that_can_write(saved: Callable[..., Path]) -> None:
    folder = str(saved("bart-lm", build("bart", head="ForConditionalGeneration", dtype=torch.float32)))
    assert type(pretrained.load_model(folder)).__name__ == "BartForConditionalGeneration"
    assert type(pretrained.load(folder)[0]).__name__ == "BartModel"


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "nowhere.gguf", "/nowhere"])
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no model at {name!r}: there is no such file or folder")):
        pretrained.load(name)


def test_what_is_missing_in_a_folder(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not load a model from"):
        pretrained.load_model(str(tmp_path))
    with pytest.raises(OSError, match="could not load the feature extractor from"):
        pretrained.load_processor(str(saved("bert")), "input_values")
    with pytest.raises(ValueError, match="takes src, expected a model of input_ids, pixel_values"):
        pretrained.load_processor(str(tmp_path), "src")


def test_a_model_with_the_head_that_its_configuration_names(tmp_path):
    folder = save_model(tmp_path, "bert", build("bert", head="ForSequenceClassification", dtype=torch.float32))
    model, tokenizer = pretrained.load_with_head(str(folder))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert callable(tokenizer)
    model.config.architectures = ["Nothing"]
    model.config.save_pretrained(folder)
    with pytest.raises(OSError, match="names the architecture Nothing, which transformers does not have"):
        pretrained.load_with_head(str(folder))
