"""The queries, keys, masks and scales that reach an attention function, whatever form they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run, state
from tiny_models import build
from torch import Tensor, nn
from versions import needs

from ffattr.decomposition.attention import LayerRecord
from ffattr.errors import CaptureError, UnsupportedModel
from ffattr.models.capture.attention_hooks import record_own_attention
from ffattr.models.capture.recorder import record_layers
from ffattr.models.registry import resolve


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", ["bool", "float", "3d", "causal", "causal-padding", "float-padding"])
@pytest.mark.parametrize("name", ["torch-even-heads", "torch-seq-first", "torch-layer"])
def test_torch_masks(name: str, kind: str) -> None:
    model = build(name)
    given = tiny_models.inputs(name, padding="right" if kind == "causal-padding" else None)
    generator = torch.Generator().manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    if kind == "bool":
        mask = (torch.rand(7, 7, generator=generator) < 0.4) & ~torch.eye(7, dtype=torch.bool)
    elif kind == "float":
        mask = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    elif kind == "3d":
        mask = torch.randn(2 * resolve(model).layers[0].heads, 7, 7, generator=generator, dtype=torch.float64)
    if kind == "float-padding":
        padding = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        padding[1, -2:] = -torch.inf
        given["src_key_padding_mask"] = padding
    else:
        given["src_mask" if name == "torch-layer" else "mask"] = mask
    description, records, valid = run(name, model, given)
    assert valid.sum() == (12 if "padding" in kind else 14)
    assert records[0].attention.causal == (kind == "causal" and name != "torch-layer")  # the encoder detects it
    assert_recomputed(description, records, valid)


@pytest.mark.parametrize("read_by_others", [False, True])
def test_float_mask_of_four_dimensions(read_by_others: bool) -> None:
    model = build("bert")
    mask = torch.randn(2, 1, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask[1, :, 5:] = torch.finfo(torch.float64).min
    if not read_by_others:
        mask[1, :, :, 5:] = torch.finfo(torch.float64).min
    description, records, valid = run("bert", model, {"input_ids": tiny_models.ids(), "attention_mask": mask})
    assert valid.sum(1).tolist() == [7, 7 if read_by_others else 5]
    assert_recomputed(description, records, valid)


def test_packed_sequences() -> None:
    model = build("llama")
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    description, records, mask = run("llama", model, {"input_ids": tiny_models.ids(1), "position_ids": position_ids})
    assert records[0].attention.mask is not None
    assert not records[0].attention.mask[0, 0, 5, 2]
    assert_recomputed(description, records, mask)


def test_upcast_attention_of_gpt2() -> None:
    model = build("gpt2", dtype=torch.float32, attn_implementation="eager", reorder_and_upcast_attn=True)
    assert len(run("gpt2", model)[1]) == 2


def test_cache_is_refused() -> None:
    from transformers import DynamicCache

    model = build("gpt2")
    cache = DynamicCache()
    model(input_ids=tiny_models.ids(), past_key_values=cache)
    with pytest.raises(CaptureError, match=r"layer 0 of GPT2Model.*7 queries but 14 keys.*past_key_values"):
        record_layers(resolve(model), {"input_ids": tiny_models.ids(), "past_key_values": cache}, print, verify=False)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "head_mask"])
def test_arguments_that_change_the_attention(argument: str) -> None:
    model = build("llama")
    before = state(model)
    kwargs = {"input_ids": tiny_models.ids(), argument: torch.tensor(1.0)}
    with pytest.raises(UnsupportedModel, match=f"LlamaAttention passes '{argument}'"):
        record_layers(resolve(model), kwargs, print, verify=False)
    assert state(model) == before


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("shape", [(2, 6, 7, 7), (1, 6, 7, 7), (7, 7)])
def test_position_bias(shape: tuple[int, ...], padding: str | None) -> None:
    needs("5.14", "whose attention functions take a position_bias")
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    description = resolve(build("llama"))
    given = {**tiny_models.inputs("llama", padding=padding), "position_bias": bias}
    records: list[LayerRecord] = []
    record_layers(description, given, records.append)
    assert records[0].attention.causal == (padding is None)
    assert_recomputed(description, records, given["attention_mask"].bool())


def test_sliding_window_without_a_mask() -> None:
    model = build("mistral", sliding_window=100)
    assert run("mistral", model)[1][0].attention.causal  # wider than the text
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
    model.config.sliding_window = 3
    with pytest.raises(UnsupportedModel, match="'sliding_window' of 3 for 7 keys"):
        run("mistral", model)


def test_silent_attention_is_an_error() -> None:
    model = build("bert")
    attention = model.encoder.layer[1].attention.self
    attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(CaptureError, match=r"layer 1 of BertModel \(bert\) handed over no.*BertSelfAttention"):
        run("bert", model)


def test_attention_called_twice_is_an_error() -> None:
    model = build("bert")
    attention = model.encoder.layer[0].attention.self
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]
    with pytest.raises(CaptureError, match=r"layer 0 of BertModel.*twice"):
        run("bert", model)


def uniform(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None


@pytest.fixture
def custom_attention() -> Iterator[Callable[[Callable[..., Any]], str]]:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    def register(function: Callable[..., Any]) -> str:
        AttentionInterface.register("custom", function)
        AttentionMaskInterface.register("custom", AttentionMaskInterface._global_mapping["sdpa"])
        return "custom"

    yield register
    AttentionInterface._global_mapping.pop("custom")
    AttentionMaskInterface._global_mapping.pop("custom")


def test_other_implementations_run_as_sdpa(custom_attention: Callable[[Callable[..., Any]], str]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = build("llama", attn_implementation=custom_attention(sdpa_attention_forward))
    before = state(model)
    assert_recomputed(*run("llama", model, tiny_models.inputs("llama", padding="left")))
    assert state(model) == before
    assert model.config._attn_implementation == "custom"


def test_other_implementations_that_compute_something_else(
    custom_attention: Callable[[Callable[..., Any]], str],
) -> None:
    model = build("bert", attn_implementation=custom_attention(uniform))
    with pytest.raises(CaptureError, match=r"recording changed output of BertModel.*attention implementation"):
        run("bert", model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_subclass_of_an_attention_module(implementation: str) -> None:
    from transformers.models.bert.modeling_bert import BertSelfAttention

    class Mine(BertSelfAttention):
        pass

    model = build("bert", attn_implementation=implementation)
    model.encoder.layer[0].attention.self.__class__ = Mine
    assert_recomputed(*run("bert", model))


def test_a_hook_that_fails_before_ours_is_the_only_complaint(recwarn: pytest.WarningsRecorder) -> None:
    """Python calls what follows a module even where something before it failed; ours had seen nothing of it."""

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError("a hook of the user")

    inner = nn.Linear(2, 2)
    inner.register_forward_pre_hook(fail)
    with record_own_attention({0: inner}, {0: 1}, lambda *given: None), pytest.raises(KeyError, match="of the user"):
        inner(torch.ones(1, 2))
    assert not [one for one in recwarn if "silenced" in str(one.message)]
