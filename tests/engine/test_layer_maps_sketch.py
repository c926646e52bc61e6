"""Sketches through `ffattr.attribute`: near the exact maps, as far as they say; exact where they would save nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import BACKENDS
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr import Sketch

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 182  # at least 16384 pairs, also of a causal model: a sketch is left out of fewer
SMALL = Sketch(12, 12)
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": TOKENS}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {"bert": WIDE, "llama": GROUPED, "mixtral": GROUPED}


def case(name: str, batch: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    return build(name, **MODELS[name]), tiny_models.inputs(name, batch=batch, length=TOKENS)


def relative(found: Tensor, exact: Tensor) -> Tensor:
    some = exact > 0
    assert ((found > 0) == some).all()
    return ((found - exact).abs() / exact)[some]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_near_the_exact_map_and_as_far_as_it_says(name: str, backend: str) -> None:
    model, given = case(name)
    for scope in model_scopes(name):
        exact = ffattr.attribute(model, given, scopes=scope, backend=backend)
        found = ffattr.attribute(model, given, scopes=scope, backend=backend, method=SMALL)
        errors = relative(found[scope], exact[scope])
        assert 0 < errors.median() < 0.15  # random vectors, the hardest there are
        assert errors.median() / 1.5 < float(found.sketch_error[scope]) < errors.median() * 1.5
        assert torch.equal(found.bias[scope], exact.bias[scope])  # only pairs are sketched
        assert "sketched to 24 of 64" in str(found.plan)


def model_scopes(name: str) -> tuple[str, ...]:
    return ("atb_ff", "atb_ff_res", "atb_ff_res_ln") if name == "bert" else ("atb_ln_ff", "atb_ln_ff_res")


def test_two_scopes_have_a_sketch_each() -> None:
    model, given = case("bert")
    exact = ffattr.attribute(model, given, scopes=["atb_ff", "layer"])
    found = ffattr.attribute(model, given, scopes=["atb_ff", "layer"], method=SMALL)
    for scope in exact.scopes:
        assert relative(found[scope], exact[scope]).median() / float(found.sketch_error[scope]) < 1.5
    assert found.sketch_error.keys() == set(exact.scopes)


def test_the_seed_decides() -> None:
    model, given = case("bert")
    first, again, other = (ffattr.attribute(model, given, method=Sketch(12, 12, seed))["layer"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_directions_are_nearer() -> None:
    model, given = case("llama")
    exact = ffattr.attribute(model, given)["layer"]
    medians = [
        relative(ffattr.attribute(model, given, method=Sketch(n, n))["layer"], exact).median() for n in (4, 12, 28)
    ]
    assert medians[0] > 1.3 * medians[1] > 1.3 * 1.3 * medians[2]


@pytest.mark.parametrize(
    ("sketch", "why"),
    [
        (Sketch(32, 32), "1 sketches of 64 are no narrower than 64"),
        (Sketch(tolerance=1e-7), "sketched"),
    ],
)
def test_exact_where_nothing_narrower_does(sketch: Sketch, why: str) -> None:
    model, given = case("bert")
    found = ffattr.attribute(model, given, method=sketch)
    torch.testing.assert_close(found["layer"], ffattr.attribute(model, given)["layer"], rtol=1e-12, atol=0)
    assert (found.sketch_error["atb_ff_res_ln"] == 0).all()
    assert why in str(found.plan)


def test_a_tolerance_picks_the_size() -> None:
    model, given = case("bert")
    exact = ffattr.attribute(model, given)["layer"]
    found = ffattr.attribute(model, given, method=Sketch(tolerance=0.08))
    assert 0 < float(found.sketch_error["atb_ff_res_ln"]) <= 0.08
    assert 0 < relative(found["layer"], exact).median() < 0.12


def test_short_sequences_are_exact() -> None:
    model = build("bert")
    given = tiny_models.inputs("bert")
    found = ffattr.attribute(model, given, method=SMALL)
    assert torch.equal(found["layer"], ffattr.attribute(model, given)["layer"])
    assert "pairs to begin with" in str(found.plan)


def test_errors_are_kept_with_the_maps(tmp_path: Path) -> None:
    model, given = case("bert", batch=2)
    found = ffattr.attribute(model, given, method=SMALL, keep=ffattr.TopK(3))
    found.save(tmp_path / "maps.safetensors")
    again = ffattr.load(tmp_path / "maps.safetensors")
    assert torch.equal(again.sketch_error["atb_ff_res_ln"], found.sketch_error["atb_ff_res_ln"])
    assert found.sketch_error["atb_ff_res_ln"].shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": SMALL, "groups": [[(0, 4)]]}, r"method=Sketch\(.*\) is for single tokens; with groups= leave it"),
        ({"method": "operator", "groups": [[(0, 4)]]}, "method='operator' is for single tokens"),
        ({"method": "sketch"}, r"unknown method 'sketch', expected .* or ffattr.Sketch\(...\)"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model, given = case("bert")
    with pytest.raises(ValueError, match=message):
        ffattr.attribute(model, given, **options)
