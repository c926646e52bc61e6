"""Any arguments to the four functions of a model: an own error, or what the reference gives."""

from __future__ import annotations

import functools
import math
from typing import Any

import documented
import hypothesis
import pytest
import tiny_models
import torch
from hostile import ODD, close, examples, judge, mostly, odd
from hypothesis import strategies as st
from torch import Tensor, nn

import ffattr
from ffattr import Dense, GaussLegendre, Pool, Reduce, Riemann, Sketch, TopK

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("bert", "gpt2", "llama", "mixtral", "olmo2", "torch-pre", "bart")
WORDS = documented.tokenizer()
SCOPES = ("layer", "all", "attn", "atb", ["atb", "layer"], "all", "layer", "atb_ff", "encoder.atb", "atb_ln_ff_experts")
VALID: dict[str, tuple[Any, ...]] = {
    "scopes": SCOPES,
    "layers": (None, 0, -1, [1, 0, 1], slice(0, 1), []),
    "queries": (None, -1, [0, 2], slice(None, None, 2), []),
    "keys": (None, [0, 1], 2),
    "groups": (None, [[(0, 2)]], torch.tensor([[0, 0, 1, -1, 1]]), "words"),
    "ig": ("exact", Riemann(3), Riemann(2, "trapezoid"), GaussLegendre(4)),
    "baseline": ("zero", "bias"),
    "value_bias": ("token", "separate"),
    "dtype": (None, torch.float64),
    "backend": ("auto", "torch", "cpu", "reference", "torch", "cpu", "cuda"),
    "method": ("auto", "direct", "operator", "mixed", "pairs", Sketch(4, 4)),
    "memory_budget": (None, 1, 10**6, 10**12),
    "check": (True, False),
    "progress": (None, lambda done, of: None),
    "keep": ("dense", Dense(torch.float64), TopK(2), TopK(2**40), Pool(2), Reduce(lambda rows: rows.layer)),
    "reduce": ("l2", "l1", "alti"),
    "toward": (None, torch.ones(40, dtype=torch.float64)),
    "tokenizer": (None, WORDS),
}
"""Arguments of `ffattr.attribute`."""


@functools.cache
def model_of(name: str) -> nn.Module:
    return tiny_models.build(name)


def strange_ids(name: str) -> list[Any]:
    ids = tiny_models.ids(1, 5)
    long = torch.full((1, 2000), 5)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    hole = mask.clone()
    hole[..., 2, :] = False
    return [
        *(ids.to(torch.uint8), ids.float(), ids.int(), ids[0], ids[None], ids[:, :0], ids[:0], -ids, ids + 10**6, long),
        *({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "attention_mask": hole}),
        *({"input_ids": ids, "attention_mask": torch.zeros(1, 5)}, {"input_ids": ids, "attention_mask": mask[..., :4]}),
        *({"input_ids": ids, "position_ids": ids + 500}, {"input_ids": ids, "position_ids": ids.float()}),
        *({"inputs_embeds": torch.rand(1, 5, 40)}, {"inputs_embeds": torch.rand(1, 5, 40).double() * 1e200}),
        *({"inputs_embeds": torch.full((1, 5, 40), math.nan).double()}, {"input_ids": ids, "past_key_values": ids}),
        *({"input_ids": ids, "token_type_ids": ids}, {"input_ids": ids, "labels": ids, "nonsense": 3}),
        *("the cat sat", "", " ", ["the cat", "dogs barking ."], ["the", 5], [[5, 6], [7]], [5, 6, 7], [[]], [[5.5]]),
        *([{"role": "user", "content": "the cat"}], torch.rand(1, 5, 40), torch.rand(1, 5, 40).double(), (ids, ids)),
        *(tiny_models.inputs(name, padding=padding) for padding in tiny_models.paddings(name)),
    ]


@st.composite
def calls(draw: Any) -> tuple[str, Any, dict[str, Any]]:
    """A model by name, inputs, and some arguments, most of which are none of its own."""
    name = draw(st.sampled_from(NAMES))
    usual = tiny_models.inputs(name, 1, 5)
    inputs = draw(mostly(st.just(usual), st.sampled_from(strange_ids(name)), odd))
    given = {}
    for argument in draw(st.lists(st.sampled_from(sorted(VALID)), unique=True, max_size=4)):
        given[argument] = draw(mostly(st.sampled_from(VALID[argument]), odd))
    return name, inputs, given


def tensors_of(result: Any) -> dict[str, Tensor]:
    """Everything of a result that the reference can be asked for."""
    found = {f"map {scope}": values for scope, values in result.maps.items()}
    found |= {f"bias {scope}": values for scope, values in result.bias.items()}
    return found | {f"top {scope}": top.values for scope, top in result.largest.items()}


def is_as_the_reference_has_it(model: nn.Module, inputs: Any, given: dict[str, Any], result: Any) -> bool:
    if any(not bool(tensor.isfinite().all()) for tensor in tensors_of(result).values()):
        return False
    if isinstance(given.get("method"), Sketch) or given.get("dtype") in (torch.float16, torch.int32):
        return True
    left = {name: value for name, value in given.items() if name not in ("backend", "method", "memory_budget", "dtype")}
    backend = "reference" if given.get("toward") is None else "torch"
    expected = tensors_of(ffattr.attribute(model, inputs, **{**left, "backend": backend}))
    found = tensors_of(result)
    return found.keys() == expected.keys() and all(close(found[name], expected[name], 1e-8) for name in found)


@hypothesis.given(calls())
@examples(120)
def test_attribute(call: tuple[str, Any, dict[str, Any]]) -> None:
    name, inputs, given = call
    model = model_of(name)
    judge(
        "attribute",
        lambda: ffattr.attribute(model, inputs, **given),
        lambda result: is_as_the_reference_has_it(model, inputs, given, result),
        model,
    )


@hypothesis.given(calls())
@examples(40)
def test_vectors(call: tuple[str, Any, dict[str, Any]]) -> None:
    name, inputs, given = call
    model = model_of(name)
    wanted = ("layers", "queries", "ig", "baseline", "value_bias", "dtype", "check", "tokenizer")
    options = {name: value for name, value in given.items() if name in wanted}

    def adds_up(found: Any) -> bool:
        """Sums of a few steps do not."""
        if options.get("ig", "exact") != "exact":
            return True
        every = found.values() if isinstance(found, dict) else [found]
        return all(close(v.values.sum(-2) + v.bias, v.total, 1e-8) for v in every if v.values.dim() == 5)

    scope = given.get("scopes", "layer")
    judge("vectors", lambda: ffattr.vectors(model, inputs, scope=scope, **options), adds_up, model)


@functools.cache
def predictor_of(name: str) -> nn.Module:
    heads = {"bert": "ForSequenceClassification", "gpt2": "LMHeadModel", "llama": "ForCausalLM"}
    return tiny_models.build(name, head=heads[name])


TARGETS = (
    3,
    (3, 5),
    "predicted",
    "next",
    " cat",
    [3, "predicted"],
    torch.ones(40).double(),
    torch.ones(2, 40).double(),
)


@hypothesis.given(
    st.sampled_from(["bert", "gpt2", "llama"]),
    mostly(st.just(tiny_models.ids(1, 5)), st.just("the cat sat"), odd),
    mostly(st.sampled_from(TARGETS), odd),
    mostly(st.sampled_from([-1, 0, [0, 2], range(3), "cls", "mean", "generated"]), odd),
    st.one_of(st.just({}), st.fixed_dictionaries({"flow": st.one_of(st.booleans(), st.just("heads"), odd)})),
    mostly(st.sampled_from([None, WORDS]), odd),
)
@examples(60)
def test_contributions(name: str, inputs: Any, target: Any, position: Any, more: Any, tokenizer: Any) -> None:
    model = predictor_of(name)
    judge(
        "contributions",
        lambda: ffattr.contributions(model, inputs, target=target, position=position, tokenizer=tokenizer, **more),
        lambda c: close(c.scores.sum(-1) + c.bias, c.value[:, None].expand_as(c.bias), 1e-8),
        model,
    )


@hypothesis.given(calls())
@examples(30)
def test_plan(call: tuple[str, Any, dict[str, Any]]) -> None:
    name, inputs, given = call
    model = model_of(name)
    options = {name: value for name, value in given.items() if name not in ("check", "progress", "keep", "toward")}
    judge(
        "plan",
        lambda: ffattr.plan(model, inputs, **options),
        lambda plan: plan.layers == [] or "layer" in str(plan),
        model,
    )


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_what_is_no_model(value: Any) -> None:
    judge("attribute", lambda: ffattr.attribute(value, tiny_models.ids(1, 5)))
