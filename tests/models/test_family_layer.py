"""A layer by the data of its family: paths followed to modules, and what is said where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import build
from torch import nn

from ffattr.errors import UnsupportedModel
from ffattr.models.families.decoders import LLAMA
from ffattr.models.families.shared_experts import GRANITE_MOE
from ffattr.models.family_layer import explain_lack, make_layer_spec, resolve_path
from ffattr.models.registry import resolve
from ffattr.models.spec.experts import Stacked
from ffattr.models.spec.weights import Columns


def test_paths_lead_to_modules() -> None:
    model = build("llama")
    spec = make_layer_spec(LLAMA, model.layers[0], model.config)
    assert spec.value is model.layers[0].self_attn.v_proj
    assert spec.norm_before_ff is model.layers[0].post_attention_layernorm
    assert (spec.heads, spec.kv_heads) == (6, 2)
    assert resolve_path(model, "layers.1.mlp") is model.layers[1].mlp


def test_a_missing_module_is_named_with_the_place_where_it_is_missing() -> None:
    model = build("llama")
    with pytest.raises(UnsupportedModel, match=r"has no .mlp.other. \(stopped at .other. of LlamaMLP"):
        make_layer_spec(replace(LLAMA, up="mlp.other"), model.layers[0], model.config)
    assert explain_lack(nn.ReLU(), "'inplace'").startswith("ReLU has no 'inplace', which its family is known to have")


def test_no_norm_is_none() -> None:
    model = build("llama")
    model.layers[0].input_layernorm = nn.Identity()
    assert make_layer_spec(LLAMA, model.layers[0], model.config).norm_before_attn is None


def test_what_scales_a_block_scales_experts_and_the_network_beside_them() -> None:
    model = build("granitemoe-shared")
    spec = make_layer_spec(GRANITE_MOE, model.layers[0], model.config)
    assert isinstance(spec.down, Stacked)
    assert spec.down.factor == 0.7
    assert spec.shared is not None
    plain = model.layers[0].shared_mlp.output_linear.weight.T
    torch.testing.assert_close(spec.shared.weights(None).down.weight, plain * 0.7)


def test_values_of_a_latent_lie_behind_the_keys_of_each_head() -> None:
    model = build("deepseek-v3")
    spec = resolve(model).layers[0]
    projection = model.layers[0].self_attn.kv_b_proj
    assert spec.value == Columns(projection, 6, 14, 6)
    assert spec.latent is not None
    assert spec.latent.down == Columns(model.layers[0].self_attn.kv_a_proj_with_mqa, 0, 10)
