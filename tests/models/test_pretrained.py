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

import ffattr
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


@pytest.mark.parametrize(
    ("family", "head", "loaded"),
    [
        ("gpt2", "LMHeadModel", "GPT2LMHeadModel"),
        ("bert", "ForMaskedLM", "BertForMaskedLM"),
        ("bert", "ForSequenceClassification", "BertForSequenceClassification"),
        ("bert", "ForTokenClassification", "BertForTokenClassification"),
        ("bart", "ForConditionalGeneration", "BartForConditionalGeneration"),
    ],
)
def test_a_model_with_its_own_head(saved: Callable[..., Path], family: str, head: str, loaded: str) -> None:
    folder = saved(f"{family}-{head}", build(family, head=head, dtype=torch.float32))
    model, tokenizer = pretrained.load_predictor(str(folder))
    assert (type(model).__name__, model.training) == (loaded, False)
    assert tokenizer("the cat")["input_ids"] == [5, 6]


def test_a_model_without_a_head_predicts_nothing(saved: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="was saved as BertModel, which has no head and so decides nothing"):
        pretrained.load_predictor(str(saved("bert")))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_folder_with_an_adapter(saved: Callable[..., Path], tmp_path: Path, task: str | None) -> None:
    peft = pytest.importorskip("peft")
    base = saved("llama-lm", build("llama", head="ForCausalLM", dtype=torch.float32))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)
    made = peft.get_peft_model(pretrained.load_predictor(str(base))[0], config).eval()
    made.save_pretrained(tmp_path)
    model, tokenizer = pretrained.load(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert tokenizer("the cat")["input_ids"] == [5, 6]
    found, expected = (ffattr.attribute(one, ids, scopes="all") for one in (model, made))
    for scope in found.scopes:
        torch.testing.assert_close(found[scope], expected[scope])
    plain = ffattr.attribute(pretrained.load(str(base))[0], ids)
    assert not torch.allclose(found["layer"], plain["layer"])
    assert pretrained.load_model(str(tmp_path), torch.float64).dtype == torch.float64
    assert pretrained.load_predictor(str(tmp_path))[0](ids).logits.shape[-1] == made.config.vocab_size


def test_an_adapter_of_no_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        pretrained.load(str(tmp_path))
