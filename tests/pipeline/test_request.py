"""Options are checked against the model: the engine that is chosen, weights, baselines."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from made_tokenizers import make_tokenizer
from tiny_models import build

import ffattr
from ffattr import NonFiniteError
from ffattr.pipeline.options import Options
from ffattr.pipeline.request import Request, _choose_engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("output.dense.weight", "down.weight"),
        ("attention.self.value.bias", "value.bias"),
        ("attention.output.LayerNorm.weight", "norm_after_attn.weight"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(path: str, part: str, value: float) -> None:
    model = build("bert")
    model.get_parameter(f"encoder.layer.1.{path}").data.view(-1)[3] = value
    for call in (ffattr.plan, ffattr.attribute, ffattr.vectors):
        with pytest.raises(NonFiniteError, match=rf"layer 1: {part} has entries that are NaN or infinite"):
            call(model, tiny_models.inputs("bert"))


def test_baseline_of_a_gated_block() -> None:
    for shape in ((52,), (3, 76), (1, 76)):
        with pytest.raises(ValueError, match=r"expected \[76\] \(gate, with up at zero\) or \[2, 76\] \(gate and up\)"):
            ffattr.attribute(build("llama"), tiny_models.inputs("llama"), baseline=torch.zeros(shape))


def description(device: str, dtype: torch.dtype, heads: int = 4) -> Any:
    parameter = SimpleNamespace(device=torch.device(device), dtype=dtype, is_cuda=device == "cuda")
    return SimpleNamespace(
        base=SimpleNamespace(parameters=lambda: iter([parameter])),
        layers=[SimpleNamespace(mixed_heads=heads), SimpleNamespace(mixed_heads=1)],
    )


@pytest.mark.parametrize(
    ("device", "model", "asked", "backend", "expected"),
    [
        ("cpu", torch.bfloat16, None, "torch", torch.float32),
        ("cpu", torch.float64, None, "auto", torch.float64),
        ("cuda", torch.float64, None, "torch", torch.float64),
        ("cuda", torch.float32, None, "torch", torch.float32),
        ("cuda", torch.bfloat16, None, "torch", torch.bfloat16),
        ("cuda", torch.float16, None, "torch", torch.float16),
        ("cuda", torch.float16, None, "reference", torch.float32),
        ("cuda", torch.float16, torch.bfloat16, "torch", torch.bfloat16),
        ("cuda", torch.float64, torch.float16, "torch", torch.float16),
        ("cuda", torch.bfloat16, torch.float64, "torch", torch.float64),
    ],
)
def test_precision(
    device: str, model: torch.dtype, asked: torch.dtype | None, backend: str, expected: torch.dtype
) -> None:
    chosen = _choose_engine(description(device, model), Options(dtype=asked, backend=backend))
    assert chosen.matmul_dtype == expected
    assert backend in ("auto", chosen.backend.name)


def request_of(name: str, inputs: Any = None, tokenizer: Any = None, **asked: Any) -> Request:
    given = tiny_models.inputs(name) if inputs is None else inputs
    return Request.from_options(build(name), given, tokenizer, Options(**asked))


def test_layers_of_the_model_belong_to_stacks() -> None:
    request = request_of("bart", layers=[1, 0, 1])
    encoder, decoder = request.stacks
    first = len(encoder.specs)
    assert request.recorded == (1, 0, 1, first + 1, first, first + 1)
    assert [request.stack_of_layer(layer) for layer in (0, first - 1, first)] == [encoder, encoder, decoder]


def test_texts_are_cut_into_batches_and_tensors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffattr.pipeline.request._TOKENS_AT_ONCE", 12)
    texts = ["the cat", "the cat sat on a mat", "a cat sat"]  # of 2, 6 and 3 tokens
    found = request_of("bert", texts, make_tokenizer()).batches()
    assert [batch for batch, _ in found] == [[1, 2], [0]]
    assert [part.mask.sum(1).tolist() for _, part in found] == [[6, 3], [2]]
    ((batch, part),) = request_of("bert").batches()
    assert (batch, tuple(part.mask.shape)) == ([0, 1], (2, 7))


def test_the_shape_of_a_layer_counts_groups() -> None:
    """Pairs of tokens that are left out cost nothing; those of a group are one for each query."""
    groups = torch.tensor([[0, 0, 1, 1, -1, -1, -1], [0, 1, 2, 3, 4, 5, 6]])
    request = request_of("bert", groups=groups)
    (stack,) = request.stacks
    weights = stack.specs[0].weights(None)
    first, second = (request.shape_of_layer(stack, 0, weights, batch) for batch in (0, 1))
    assert (first.queries, first.pairs, first.group_pairs) == (7, 7 * 4, 7 * 2)
    assert (second.queries, second.pairs, second.group_pairs) == (7, 7 * 7, 7 * 7)
    plain = request_of("bert", queries=[1, 2])
    found = plain.shape_of_layer(plain.stacks[0], 0, weights, 0)
    assert (found.queries, found.tokens, found.pairs) == (2, 7, 14)
    assert plain.shape_of_layer(plain.stacks[0], 0, weights, 0, pairs=5).pairs == 5


@pytest.mark.parametrize("asked", [{"keys": [0]}, {"groups": "words"}])
def test_groups_of_two_stacks_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keys= and groups= are for models with one stack of layers"):
        request_of("bart", **asked)


def test_groups_have_one_method() -> None:
    groups = torch.zeros(2, 7, dtype=torch.int64)
    assert request_of("bert", groups=groups, method="direct").options.method == "direct"
    with pytest.raises(ValueError, match=r"method='operator' is for single tokens; with groups= leave it to 'auto'"):
        request_of("bert", groups=groups, method="operator")


def test_a_baseline_of_both_streams_of_a_gated_block() -> None:
    for shape in ((76,), (2, 76)):
        baseline = torch.full(shape, 0.5)
        assert request_of("llama", baseline=baseline).rule.baseline is baseline
    with pytest.raises(ValueError, match=r"baseline has shape \[52\], expected \[76\].* in layer 0$"):
        request_of("mixtral", baseline=torch.zeros(52))
