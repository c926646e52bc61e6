"""What is recorded is what the model computed, and the model is left as it was."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run, state
from tiny_models import FAMILIES, HF_FAMILIES, TORCH_FAMILIES, build
from torch import Tensor, nn

import ffattr
from ffattr.decomposition.attention import LayerRecord
from ffattr.errors import CaptureError, ForwardError, NonFiniteError
from ffattr.models.capture.recorder import record_layers
from ffattr.models.inputs.prepare import prepare_inputs
from ffattr.models.registry import resolve

# transformers computes these softmaxes in float32 whatever the model's dtype; in float64 its mask value, the lowest
# float64, becomes -inf there, so that a left-padded batch is NaN
FLOAT32_SOFTMAX = ("opt", "opt-350m", "opt-no-affine", "llama", "llama-bias", "mistral", "qwen2")


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_records_recompute_every_layer(name: str, padding: str | None) -> None:
    model = build(name)
    assert_recomputed(*run(name, model, tiny_models.inputs(name, padding=padding)))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", HF_FAMILIES)
def test_eager_attention(name: str, padding: str | None) -> None:
    narrow = name in FLOAT32_SOFTMAX
    model = build(name, attn_implementation="eager", dtype=torch.float32 if narrow else torch.float64)
    given = tiny_models.inputs(name, padding=padding)
    assert_recomputed(*run(name, model, given), tolerance=2e-4 if narrow else 1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_float32_with_transformers_own_norms(name: str) -> None:
    assert_recomputed(*run(name, build(name, dtype=torch.float32)), tolerance=2e-4)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((n, i) for n in HF_FAMILIES for i in ("sdpa", "eager")), *((n, "") for n in TORCH_FAMILIES)],
)
def test_output_is_identical_with_and_without_capture(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, **({"attn_implementation": implementation} if implementation else {}))
    description = resolve(model)
    outputs: list[Tensor] = []
    hook = description.layers[-1].module.register_forward_hook(lambda module, args, output: outputs.append(output))
    kwargs = prepare_inputs(description, model, tiny_models.inputs(name, padding="right")).kwargs
    monkeypatch.setattr(
        torch.backends.mha, "_is_fastpath_enabled", bool(implementation)
    )  # other rounding, nested tensors
    with torch.no_grad():
        description.base(**kwargs)
    before = state(model)
    record_layers(description, kwargs, lambda recorded: None, verify=False)
    assert state(model) == before
    hook.remove()
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch-even-heads"])
def test_model_is_restored_when_on_layer_raises(name: str, error: type[BaseException]) -> None:
    model = build(name)
    before = state(model)

    def fail(recorded: LayerRecord) -> None:
        raise error("stop here")

    description = resolve(model)
    with pytest.raises(error, match="stop here"):
        record_layers(description, prepare_inputs(description, model, tiny_models.inputs(name)).kwargs, fail)
    assert state(model) == before
    assert len(run(name, model)[1]) == 2


def test_model_is_restored_when_the_model_raises() -> None:
    model = build("bert")
    before = state(model)
    description = resolve(model)
    with pytest.raises(
        ForwardError, match=r"^BertModel does not run on input_ids \(1, 1\): index out of range"
    ) as found:
        record_layers(description, {"input_ids": torch.tensor([[999]])}, lambda recorded: None, verify=False)
    assert isinstance(found.value.__cause__, IndexError)
    assert state(model) == before


@pytest.mark.parametrize("name", ["bert", "torch-pre"])
def test_one_layer_at_a_time_in_order(name: str) -> None:
    model = build(name)
    description = resolve(model)
    events: list[str] = []
    for index, spec in enumerate(description.layers):
        spec.module.register_forward_pre_hook(lambda module, args, i=index: events.append(f"start {i}"))
    kwargs = prepare_inputs(description, model, tiny_models.inputs(name)).kwargs
    record_layers(description, kwargs, lambda recorded: events.append(f"record {recorded.index}"), verify=False)
    assert events == ["start 0", "record 0", "start 1", "record 1"]


def test_selected_layers() -> None:
    model = build("bert")
    assert [r.index for r in run("bert", model, layers=[-1])[1]] == [1]
    assert [r.index for r in run("bert", model, layers=[1, 0, 1])[1]] == [0, 1]
    with pytest.raises(ValueError, match="layer 2 does not exist: BertModel has layers 0 to 1"):
        run("bert", model, layers=[2])


def test_capture_inside_capture() -> None:
    model = build("gpt2")
    description = resolve(model)
    kwargs = prepare_inputs(description, model, tiny_models.inputs("gpt2")).kwargs
    before = state(model)
    inner: list[int] = []
    outer: list[int] = []

    def on_layer(recorded: LayerRecord) -> None:
        outer.append(recorded.index)
        model(**kwargs)
        record_layers(description, kwargs, lambda r: inner.append(r.index))

    record_layers(description, kwargs, on_layer)
    assert (outer, inner) == ([0, 1], [0, 1, 0, 1])
    assert state(model) == before


def test_captures_in_threads() -> None:
    model = build("bert")
    description = resolve(model)
    kwargs = prepare_inputs(description, model, tiny_models.inputs("bert")).kwargs
    before = state(model)
    seen: list[list[int]] = []

    def work() -> None:
        records: list[int] = []
        record_layers(description, kwargs, lambda recorded: records.append(recorded.index))
        seen.append(records)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[0, 1]] * 4
    assert state(model) == before


@pytest.mark.parametrize("name", ["torch-pre", "torch-seq-first", "torch-layer"])
def test_torch_unbatched(name: str) -> None:
    model = build(name)
    src = tiny_models.inputs(name)["src"]
    src = src[:, 0] if name == "torch-seq-first" else src[0]
    description, records, mask = run(name, model, {"src": src, "src_key_padding_mask": torch.arange(7) > 5})
    assert records[0].input.shape == (1, 7, 40)
    assert mask.tolist() == [[True] * 6 + [False]]
    assert_recomputed(description, records, mask)


def test_one_token() -> None:
    for name in ("gpt2", "bert", "torch-post"):
        assert_recomputed(*run(name, build(name), tiny_models.inputs(name, batch=1, length=1)))


def spoil_output(module: nn.Module, token: int) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs).index_fill(1, torch.tensor([token]), torch.nan)


@pytest.mark.parametrize("name", ["bert", "torch-pre"])
def test_non_finite_values(name: str) -> None:
    model = build(name)
    description = resolve(model)
    spoil_output(description.layers[1].module, 3)
    with pytest.raises(NonFiniteError, match=r"output of layer 1 .* is NaN or infinite \(first at batch 0, token 3"):
        run(name, model)


def test_non_finite_padding_is_no_matter() -> None:
    model = build("bert")
    spoil_output(model.encoder.layer[1], 6)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    given = {"input_ids": tiny_models.ids(1), "attention_mask": attention_mask}
    assert len(run("bert", model, given)[1]) == 2
    assert ffattr.attribute(model, given, check=False)["layer"].isfinite().all()
    with pytest.raises(NonFiniteError, match="output of layer 1"):  # without the mask, it is a token as any other
        record_layers(resolve(model), given, lambda recorded: None)


def test_skipped_layer_is_an_error() -> None:
    model = build("llama")
    description = resolve(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(CaptureError, match=r"layers \[1\] of LlamaModel .*did not run"):
        record_layers(description, {"input_ids": tiny_models.ids()}, lambda recorded: None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_hidden_layers": 3}, ["00"] * 3),
        ({"num_hidden_layers": 5, "num_hidden_groups": 2}, ["00"] * 3 + ["10"] * 2),
        ({"num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2}, ["00", "01"] * 2 + ["10", "11"]),
    ],
)
def test_layers_that_share_a_module(settings: dict[str, int], expected: list[str]) -> None:
    """A run of the module is a layer, in the order of the runs."""
    model = build("albert", **{"num_hidden_groups": 1, **settings})
    groups = model.encoder.albert_layer_groups
    names = {layer: f"{g}{i}" for g, group in enumerate(groups) for i, layer in enumerate(group.albert_layers)}
    description, records, mask = run("albert", model, tiny_models.inputs("albert", padding="left"))
    assert [names[spec.module] for spec in description.layers] == expected
    assert_recomputed(description, records, mask)
    for one, following in pairwise(records):
        assert torch.equal(one.output, following.input)
    assert torch.equal(records[-1].output, model(**tiny_models.inputs("albert", padding="left")).last_hidden_state)


def test_selected_layers_that_share_a_module() -> None:
    model = build("albert", num_hidden_layers=4)
    before = state(model)
    whole = run("albert", model)[1]
    part = run("albert", model, layers=[2, 1, -1])[1]
    assert [recorded.index for recorded in part] == [1, 2, 3]
    for recorded in part:
        assert torch.equal(recorded.input, whole[recorded.index].input)
        assert torch.equal(recorded.attention.query, whole[recorded.index].attention.query)
    assert state(model) == before


def test_a_layer_put_in_twice() -> None:
    model = build("bert")
    model.encoder.layer[1] = model.encoder.layer[0]
    assert_recomputed(*run("bert", model))


def test_modules_that_run_too_often() -> None:
    model = build("albert", num_hidden_layers=3, num_hidden_groups=1)
    description, kwargs = resolve(model), {"input_ids": tiny_models.ids()}
    before = state(model)
    with pytest.raises(
        CaptureError, match=r"layer 0 of AlbertModel \(albert\) ran twice in one forward pass, expected once"
    ):
        record_layers(replace(description, layers=description.layers[:1]), kwargs, lambda recorded: None)
    with pytest.raises(
        CaptureError, match=r"layers \[0, 1\] of AlbertModel \(albert\) share ran 3 times .* expected 2"
    ):
        record_layers(replace(description, layers=description.layers[:2]), kwargs, lambda recorded: None, [0])
    with pytest.raises(CaptureError, match=r"layers \[3\] of AlbertModel \(albert\) did not run"):
        record_layers(
            replace(description, layers=(*description.layers, description.layers[0])), kwargs, lambda recorded: None
        )
    assert state(model) == before


def test_attention_that_runs_too_often() -> None:
    model = build("albert", num_hidden_layers=3, num_hidden_groups=1)
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    calls: list[int] = []

    def again(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            module.forward(*args)  # the second layer's attention, once more

    hook = layer.attention.register_forward_pre_hook(again)
    with pytest.raises(CaptureError, match=r"layer 1 of AlbertModel \(albert\) called its attention function twice"):
        record_layers(resolve(model), {"input_ids": tiny_models.ids()}, lambda recorded: None, verify=False)
    hook.remove()
