"""Signed maps: what a direction reads of the vectors of every scope."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")


def direction(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt-neox", "olmo2", "mixtral", "deepseek-v2"])
def test_maps_are_projections_of_the_vectors(name):
    model, given = build(name), tiny_models.inputs(name, padding="right")
    read = direction(model.config.hidden_size)
    attr = ffattr.attribute(model, given, scopes="all", toward=read, queries=[-1, 0, 3])
    vectors = ffattr.vectors(model, given, scope=list(attr.scopes), queries=[-1, 0, 3])
    assert attr.error.max() < 1e-10
    for scope in attr.scopes:
        assert torch.allclose(attr.maps[scope], vectors[scope].values @ read, rtol=0, atol=1e-10), scope
        if "heads" not in scope:
            assert torch.allclose(attr.bias[scope], vectors[scope].bias @ read, rtol=0, atol=1e-10), scope
    assert (attr["layer"] < 0).any()


@pytest.mark.parametrize("scope", ["cross.attn", "cross.attn_res", "cross.layer", "decoder.atb"])
def test_vectors_of_an_encoders_tokens_are_projected_as_well(scope):
    model, given = build("bart"), tiny_models.inputs("bart", padding="right")
    read = direction(model.config.d_model)
    attr = ffattr.attribute(model, given, scopes=scope, toward=read)
    (name,) = attr.scopes
    vectors = ffattr.vectors(model, given, scope=scope)
    assert torch.allclose(attr.maps[name], vectors.values @ read, rtol=0, atol=1e-10)
    assert torch.allclose(attr.bias[name], vectors.bias @ read, rtol=0, atol=1e-10)


def test_groups_of_keys_are_added_up_and_policies_take_the_rows():
    model, ids = build("llama"), tiny_models.ids(2, 6)
    read = direction(48)
    whole = ffattr.attribute(model, ids, toward=read)["layer"]
    groups = [[(0, 2), (3, 6)], [(0, 6)]]
    grouped = ffattr.attribute(model, ids, toward=read, groups=groups)["layer"]
    assert torch.allclose(grouped[:, 0, :, 0], whole[:, 0, :, :2].sum(-1), rtol=0, atol=1e-12)
    assert torch.allclose(grouped[:, 0, :, 1], whole[:, 0, :, 3:].sum(-1), rtol=0, atol=1e-12)
    assert torch.allclose(grouped[:, 1, :, 0], whole[:, 1].sum(-1), rtol=0, atol=1e-12)
    some = ffattr.attribute(model, ids, toward=read, keys=[1, 4])["layer"]
    assert torch.allclose(some, whole[..., [1, 4]], rtol=0, atol=1e-12)
    top = ffattr.attribute(model, ids, toward=read, keep=ffattr.TopK(1)).largest["atb_ln_ff_res"]
    assert torch.equal(top.values[..., 0].abs(), whole.abs().amax(-1))


def test_the_result_says_what_it_holds(tmp_path):
    attr = ffattr.attribute(build("llama"), tiny_models.ids(1, 5), toward=direction(48))
    assert (attr.reduce, attr.measure) == ("toward", "projection")
    attr.save(tmp_path / "maps.safetensors")
    assert ffattr.load(tmp_path / "maps.safetensors").reduce == "toward"
    assert "toward" in repr(attr)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"toward": " Paris"}, TypeError, "expected a direction, a tensor .d.. What tokens give to a logit"),
        ({"toward": torch.ones(3)}, ValueError, "toward has 3 entries, but the model's streams have 48"),
        ({"toward": torch.ones(1, 48)}, ValueError, "expected a direction .d. of finite floats"),
        ({"toward": torch.full((48,), float("inf"))}, ValueError, "finite"),
        ({"toward": torch.ones(48), "reduce": "l1"}, ValueError, "leaves nothing for reduce='l1'"),
        ({"toward": torch.ones(48), "method": "direct"}, ValueError, "method='direct'"),
    ],
)
def test_what_is_no_direction_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        ffattr.attribute(build("llama"), tiny_models.ids(1, 5), **changed)
