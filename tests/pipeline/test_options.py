"""Options that no model could be asked for are refused before any model is looked at."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import ffattr
from ffattr import Sketch
from ffattr.pipeline.options import Options, check_progress

FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dtype": torch.int32},  # which backends refuse by name
        {"memory_budget": 1},
        {"value_bias": "separate"},
        {"dtype": FLOAT8, "method": "direct"},
        {"dtype": FLOAT8, "method": "auto"},
        {"dtype": FLOAT8, "method": Sketch(64)},
        {"dtype": torch.bfloat16, "method": "operator"},
        {"dtype": torch.bfloat16, "method": "mixed"},
    ],
    ids=str,
)
def test_what_some_model_could_be_asked_for(given: dict[str, Any]) -> None:
    Options(**given).check()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype is 'float32', expected a torch.dtype such as torch.float32, or None"),
        ({"toward": torch.ones(3), "backend": "reference"}, ValueError, "'reference' has none of; use 'torch'"),
        ({"method": {}}, TypeError, "method is {}, expected 'auto', the name of one or an ffattr.Sketch"),
        ({"reduce": []}, ValueError, r"unknown reduce \[\], expected one of 'l2', 'l1', 'alti'"),
        ({"dtype": float}, TypeError, "dtype is <class 'float'>, expected a torch.dtype"),
        ({"memory_budget": 0}, TypeError, "memory_budget is 0, expected a positive number of bytes, or None"),
        ({"memory_budget": -1}, TypeError, "memory_budget is -1, expected a positive number of bytes"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget is 1000000000.0, expected a positive number of bytes"),
        ({"value_bias": "bias"}, ValueError, "unknown value_bias 'bias', expected 'token' or 'separate'"),
        ({"value_bias": None}, ValueError, "unknown value_bias None, expected 'token' or 'separate'"),
        (
            {"dtype": FLOAT8, "method": "operator"},
            ValueError,
            "'operator' does not run in torch.float8_e4m3fn; 'd",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**given).check()


@pytest.mark.parametrize("call", [ffattr.attribute, ffattr.plan, ffattr.vectors])
def test_defaults_are_those_of_the_calls(call: Any) -> None:
    """The same option means the same everywhere, also where it is left out."""
    own = Options()
    given = inspect.unwrap(call).__kwdefaults__
    shared = [name for name in vars(own) if name in given]
    assert {"layers", "queries", "ig", "baseline", "value_bias", "dtype"} <= set(shared)
    assert {name: given[name] for name in shared} == {name: getattr(own, name) for name in shared}


@pytest.mark.parametrize("compute", [ffattr.attribute, ffattr.contributions])
def test_progress_is_something_to_call(compute: Any) -> None:
    check_progress(print)
    check_progress(None)
    target = {"target": 3} if compute is ffattr.contributions else {}
    with pytest.raises(TypeError, match=r"progress is 5, expected a function of \(layers done, layers in all\)"):
        compute(None, None, progress=5, **target)
