"""What users may pass, and what they are told when it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from made_tokenizers import make_tokenizer
from tiny_models import VOCABULARY, build, ids
from torch import Tensor, nn

from ffattr import attribute
from ffattr.decomposition.attention import LayerRecord
from ffattr.errors import UnsupportedModel
from ffattr.models.capture.recorder import record_layers
from ffattr.models.inputs.prepare import Inputs, prepare_inputs
from ffattr.models.registry import resolve


def ready(model: nn.Module, inputs: Any, tokenizer: Any = None) -> Inputs:
    return prepare_inputs(resolve(model), model, inputs, tokenizer)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return build("bert")


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return build("gpt2")


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return build("torch-pre")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def test_ids(bert: nn.Module) -> None:
    prepared = ready(bert, ids())
    assert list(prepared.kwargs) == ["input_ids"]
    assert prepared.mask.shape == (2, 7)
    assert prepared.mask.all()
    assert prepared.tokens == [[str(i) for i in row] for row in ids().tolist()]
    assert ready(bert, ids()[0]).mask.shape == (1, 7)
    assert ready(bert, ids().int()).mask.shape == (2, 7)


def test_mapping(bert: nn.Module) -> None:
    given = {**tiny_models.inputs("bert", padding="left"), "labels": ids(), "token_type_ids": None, "use_cache": True}
    prepared = ready(bert, given)
    assert set(prepared.kwargs) == {"input_ids", "attention_mask"}
    assert prepared.mask.tolist()[1] == [False] * 2 + [True] * 5


def test_arguments_of_the_head_are_dropped() -> None:
    model = build("llama", head="ForCausalLM")
    assert list(ready(model, {"input_ids": ids(), "logits_to_keep": torch.tensor(1)}).kwargs) == ["input_ids"]


def test_embeddings(bert: nn.Module) -> None:
    prepared = ready(bert, {"inputs_embeds": torch.randn(2, 4, 40)})
    assert prepared.tokens == [["0", "1", "2", "3"]] * 2


def test_text(bert: nn.Module, tokenizer: Any) -> None:
    one = ready(bert, "the cat sat", tokenizer)
    assert one.tokens == [["[CLS]", "the", "cat", "sat", "[SEP]"]]
    assert one.mask.all()
    two = ready(bert, ["the cat sat", "a dog"], tokenizer)
    assert two.tokens[1] == ["[CLS]", "a", "dog", "[SEP]", "[PAD]"]
    assert two.mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert "token_type_ids" in two.kwargs
    assert two.kwargs["token_type_ids"].shape == (2, 5)
    batch = tokenizer(["the cat sat", "a dog"], padding=True, return_tensors="pt")
    assert ready(bert, batch, tokenizer).tokens == two.tokens
    assert ready(bert, batch["input_ids"], tokenizer).tokens == two.tokens


@pytest.mark.parametrize("special", [{"eos_token": "</s>", "padding_side": "left"}, {}])
def test_text_without_a_pad_token(gpt2: nn.Module, special: dict[str, str]) -> None:
    tokenizer = make_tokenizer(**special)
    both = ready(gpt2, ["the cat sat on", "a dog"], tokenizer)
    assert tokenizer.pad_token is None
    assert both.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert both.kwargs["input_ids"][1, 2:].tolist() == ([4, 4] if special else [0, 0])

    def outputs(prepared: Inputs) -> list[Tensor]:
        records: list[LayerRecord] = []
        record_layers(resolve(gpt2), prepared.kwargs, records.append)
        return [r.output for r in records]

    alone = outputs(ready(gpt2, "a dog", tokenizer))
    for padded, single in zip(outputs(both), alone, strict=True):  # positions as in the text on its own
        torch.testing.assert_close(padded[1, :2], single[0], rtol=1e-9, atol=1e-9)


def test_text_for_a_model_without_token_types(tokenizer: Any) -> None:
    assert set(ready(build("distilbert"), "a cat", tokenizer).kwargs) == {"input_ids", "attention_mask"}


TEXTS = [
    "a dog",
    "the cat sat on a mat",
    "the",
    "the dog ran",
    "a cat",
    "the cat sat on the dog",
]  # lengths 4 8 3 5 4 8


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10**6, [[0, 1, 2, 3, 4, 5]]),
        (47, [[0, 1, 3, 4, 5], [2]]),
        (16, [[1, 5], [0, 3, 4], [2]]),
        (12, [[1], [5], [0, 3], [2, 4]]),
        (7, [[1], [5], [3], [0], [4], [2]]),
    ],
)
def test_texts_in_batches(bert: nn.Module, tokenizer: Any, limit: int, expected: list[list[int]]) -> None:
    whole = ready(bert, TEXTS, tokenizer)
    assert whole.lengths == (4, 8, 3, 5, 4, 8)
    batches = whole.split_batches(limit)
    assert [rows for rows, _ in batches] == expected
    for rows, batch in batches:
        alone = ready(bert, [TEXTS[row] for row in rows], tokenizer)
        assert batch.mask.numel() <= limit or len(rows) == 1
        assert batch.kwargs.keys() == alone.kwargs.keys() == {"input_ids", "token_type_ids", "attention_mask"}
        for name, value in alone.kwargs.items():
            assert torch.equal(batch.kwargs[name], value)
        assert torch.equal(batch.mask, alone.mask)
        assert batch.tokens == alone.tokens
        assert batch.lengths == alone.lengths


def test_batches_change_no_map(bert: nn.Module, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attribute(bert, TEXTS, tokenizer=tokenizer)
    batches, seen = Inputs.split_batches, list[tuple[int, int]]()
    monkeypatch.setattr(Inputs, "split_batches", lambda self, limit: batches(self, 12))
    cut = attribute(bert, TEXTS, tokenizer=tokenizer, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(cut["layer"], whole["layer"], rtol=1e-10, atol=1e-10)
    assert torch.equal(cut.mask, whole.mask)
    assert cut.tokens == whole.tokens
    assert seen == [(done, 4 * len(whole.layers)) for done in range(1, 4 * len(whole.layers) + 1)]


def test_one_text_is_one_batch(bert: nn.Module, tokenizer: Any) -> None:
    ((rows, batch),) = ready(bert, "the cat", tokenizer).split_batches(1)
    assert rows == [0]
    assert batch.tokens == [["[CLS]", "the", "cat", "[SEP]"]]


def test_tensors_are_not_cut_apart(bert: nn.Module, encoder: nn.Module, tokenizer: Any) -> None:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    src = torch.randn(3, 5, 40, dtype=torch.float64)
    for whole in (ready(bert, batch, tokenizer), ready(bert, ids()), ready(encoder, src)):
        assert whole.lengths is None
        ((rows, same),) = whole.split_batches(1)
        assert rows == list(range(len(whole.mask)))
        assert same is whole


def test_features(encoder: nn.Module) -> None:
    src = torch.randn(2, 5, 40, dtype=torch.float64)
    assert ready(encoder, src).mask.shape == (2, 5)
    assert ready(encoder, src[0]).mask.shape == (1, 5)
    assert ready(encoder, src).tokens == [["0", "1", "2", "3", "4"]] * 2
    assert ready(build("torch-seq-first"), src).mask.shape == (5, 2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (padding, torch.zeros(2, 5).masked_fill(padding, -torch.inf)):
        prepared = ready(encoder, {"src": src, "mask": torch.zeros(5, 5), "src_key_padding_mask": mask})
        assert torch.equal(prepared.mask, ~padding)
    layer = build("torch-layer")
    assert ready(layer, {"src": src, "src_mask": None, "src_key_padding_mask": padding}).mask.sum() == 8


BAD: list[tuple[Any, type[Exception], str]] = [
    ("the cat", ValueError, "inputs is text .'the cat'.; pass the model's tokenizer"),
    (["the cat", "a dog"], ValueError, "inputs is text"),
    ([], TypeError, "inputs is a list"),
    (["a", 1], TypeError, "inputs is a list"),
    (None, TypeError, "inputs is a NoneType"),
    (torch.rand(2, 7), TypeError, "input_ids has dtype torch.float32, expected integer.*inputs_embeds"),
    (torch.ones(2, 7).bool(), TypeError, "input_ids has dtype torch.bool"),
    ({"inputs_embeds": ids()}, TypeError, "inputs_embeds has dtype torch.int64, expected a float"),
    (ids()[None], ValueError, r"input_ids has shape \(1, 2, 7\), expected \[batch, T\]"),
    ({"input_ids": ids()[0]}, ValueError, r"input_ids has shape \(7,\), expected \[batch, T\]"),
    (ids()[:, :0], ValueError, r"shape \(2, 0\): no tokens"),
    (ids()[:0], ValueError, r"shape \(0, 7\): no tokens"),
    ({}, ValueError, "inputs has nothing, expected 'input_ids' among its keys"),
    ({"attention_mask": torch.ones(1, 2)}, ValueError, r"inputs has \['attention_mask'\], expected 'input_ids'"),
    ({"input_ids": [[1, 2]]}, TypeError, r"inputs\['input_ids'\] is a list, expected a tensor.*return_tensors"),
    ({"input_ids": ids(), "inputs_embeds": torch.rand(2, 7, 40)}, ValueError, "both 'input_ids' and 'inputs_embeds'"),
    ({"input_ids": ids(), "past_key_values": object()}, ValueError, "inputs has 'past_key_values': a cache"),
    (
        {"input_ids": ids(), "encoder_hidden_states": ids()},
        UnsupportedModel,
        "'encoder_hidden_states', but no layer of BertModel",
    ),
    (
        {"input_ids": ids(), "attention_mask": torch.ones(2, 6)},
        ValueError,
        r"attention_mask has shape \(2, 6\), expected \(2, 7\) or .* for 2 sequences of 7 tokens",
    ),
    (
        {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [0] * 7])},
        ValueError,
        "batch row 1 is all padding",
    ),
    (torch.tensor([[1, 2], [3, VOCABULARY]]), ValueError, r"input_ids\[1, 1\] is 61, outside the vocabulary of 61"),
    (torch.tensor([[1, -1]]), ValueError, r"input_ids\[0, 1\] is -1, outside the vocabulary"),
    (ids(1, 33), ValueError, "inputs have 33 tokens, but BertModel has 32 learned positions"),
    (ids().to("meta"), ValueError, "input_ids is on meta, but the model is on cpu"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_errors(bert: nn.Module, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ready(bert, inputs)


BAD_FEATURES: list[tuple[Any, type[Exception], str]] = [
    ("the cat", TypeError, "TransformerEncoder takes a float tensor of features, not text: 'the cat'"),
    (ids(), TypeError, "src has dtype torch.int64, expected a float tensor"),
    (torch.rand(40), ValueError, r"src has shape \(40,\), expected"),
    ({"src": torch.rand(2, 7, 40), "attention_mask": 1}, TypeError, "'attention_mask', which TransformerEncoder"),
    (
        {"src": torch.rand(2, 7, 40), "src_key_padding_mask": torch.ones(7).bool()},
        ValueError,
        r"src_key_padding_mask has shape \(7,\), expected \(2, 7\)",
    ),
    (
        {"src": torch.rand(2, 7, 40), "src_key_padding_mask": torch.ones(2, 7).bool()},
        ValueError,
        "batch row 0 is all padding",
    ),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_FEATURES, ids=[m[:40] for *_, m in BAD_FEATURES])
def test_errors_of_features(encoder: nn.Module, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ready(encoder, inputs)


@pytest.mark.parametrize("texts", ["", "   ", ["the cat", ""]])
def test_empty_text(bert: nn.Module, tokenizer: Any, texts: Any) -> None:
    with pytest.raises(ValueError, match=r"text [01] \('\s*'\) has no tokens"):
        ready(bert, texts, tokenizer)


def test_not_a_tokenizer(bert: nn.Module) -> None:
    with pytest.raises(TypeError, match="tokenizer is a int"):
        ready(bert, "the cat", 3)


def test_tensors_in_the_order_of_the_forward(bert: nn.Module) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = prepare_inputs(resolve(bert), bert, (ids, mask))
    assert found.mask.tolist() == mask.bool().tolist()
    assert torch.equal(found.kwargs["input_ids"], ids)


def test_features_in_a_wider_dtype_than_the_model_has() -> None:
    narrow = build("bert", dtype=torch.float32)
    wide = {"inputs_embeds": torch.zeros(1, 3, narrow.config.hidden_size, dtype=torch.float64)}
    with pytest.raises(
        TypeError, match=r"inputs_embeds has dtype torch.float64, but the model has torch.float32. Use .to"
    ):
        prepare_inputs(resolve(narrow), narrow, wide)
