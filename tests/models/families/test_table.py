"""Families of transformers that not every test tries: layers are reproduced, maps are those of the definition."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from compare_results import assert_same, ways_of
from recording import assert_recomputed, run
from tiny_models import IMAGE_FAMILIES, MORE_FAMILIES, SOUND_FAMILIES, build

import ffattr
from ffattr.decomposition.reference import Rule, decompose
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

PRE = ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")
POST = ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln")
BETWEEN = ("attn_heads", "attn", "atb", "atb_ff", "atb_ff_res")
ENCODERS = ("ernie", "data2vec-text", "modernbert")
DEBERTA = ("deberta", "deberta-v2", "deberta-v2-conv")
POST_LN = ("ernie", "data2vec-text", "albert", "wav2vec2", "hubert", "wavlm", "mpnet", "rembert", "roformer", *DEBERTA)
FALCON = ("falcon-7b", "falcon-40b", "falcon-11b")
PARALLEL = ("stablelm-parallel", "phi", "gpt-neox", "cohere", "cohere2", "gptj", "codegen", *FALCON)
DENSE = (
    "ernie",
    "data2vec-text",
    "starcoder2",
    "arcee",
    "phi",
    "gpt-neox",
    "gpt-neox-sequential",
    "albert",
    "clip-text",
    "nemotron",
    "gptj",
    "codegen",
    "gpt-bigcode",
    "gpt-bigcode-heads",
    "gpt-neo",
    "bloom",
    "mpt",
    *FALCON,
    "falcon-rw",
    "mpnet",
    "rembert",
    "roformer",
    "megatron-bert",
    *DEBERTA,
    "siglip-text",
)
WINDOWS = ("gemma2", "gemma3", "olmo3", "modernbert", "cohere2", "gpt-neo")
LENGTH = 7  # longer than every window


def implementation(name: str) -> str:
    return "eager" if name == "gemma2" else "sdpa"


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_description(name: str) -> None:
    for spec in resolve(build(name)).layers:
        weights = spec.weights(torch.float64)
        expected = POST if name in POST_LN else BETWEEN if name in ("olmo2", "olmo3") else PRE
        assert weights.scopes == expected
        dense = name in (*DENSE, *IMAGE_FAMILIES, *SOUND_FAMILIES) and name != "dinov2-swiglu"
        assert (weights.branches[0].gate is None) == dense
        assert weights.parallel == (name in PARALLEL)
        assert (weights.norm_of_attn is not None) == name.startswith(("gemma2", "gemma3", "olmo2", "olmo3", "glm4"))
        assert (weights.norm_of_ff is not None) == (weights.norm_of_attn is not None)


@pytest.mark.parametrize(("name", "padding"), [(n, p) for n in MORE_FAMILIES for p in tiny_models.paddings(n)])
def test_layers_are_reproduced(name: str, padding: str | None) -> None:
    """From queries, keys, mask and the description alone."""
    if implementation(name) == "eager":  # its softmax is in float32, its mask in float64 not finite
        model, tolerance = build(name, dtype=torch.float32), 2e-4
    else:
        model, tolerance = build(name), 1e-10
    assert_recomputed(*run(name, model, tiny_models.inputs(name, length=LENGTH, padding=padding)), tolerance=tolerance)


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_eager_attention(name: str) -> None:
    """To the rounding of its softmax, which transformers computes in float32 for most."""
    model = build(name, attn_implementation="eager")
    found = ffattr.attribute(model, tiny_models.inputs(name, length=LENGTH))
    assert 0 < found.error.max() < 1e-6


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_vectors_and_bias_add_up(name: str, value_bias: str) -> None:
    description, records, _ = run(name, build(name), tiny_models.inputs(name, length=LENGTH))
    rows = torch.arange(records[0].input.shape[1])
    for recorded in records:
        weights = description.layers[recorded.index].weights(torch.float64)
        attention = recorded.attention.sequence(1, rows, torch.float64)
        for baseline in ("zero", "bias"):
            rule = Rule(baseline=baseline)
            found = decompose(weights, recorded.input[1], attention, rows, rule, value_bias)
            scopes = {str(scope): stream for scope, stream in found}
            assert tuple(scopes) == weights.scopes
            heads, attn = scopes.pop("attn_heads").vectors, scopes["attn"].vectors
            torch.testing.assert_close(heads.sum(0), attn, rtol=0, atol=1e-12)
            for scope, stream in scopes.items():
                gap = (stream.vectors.sum(1) + stream.bias - stream.total).abs().max()
                assert gap <= 1e-12 * stream.total.abs().max(), scope
            torch.testing.assert_close(stream.total, recorded.output[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "padding"), [(n, p) for n in MORE_FAMILIES for p in tiny_models.paddings(n) if p != "left"]
)
def test_every_backend(name: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding=padding)
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    for backend, method in ways_of(name, padding, MORE_FAMILIES):
        found = ffattr.attribute(model, given, scopes="all", backend=backend, method=method, dtype=torch.float64)
        assert_same(found, expected)
        assert found.error.max() < 1e-6
    for scope in ("atb", expected.scopes[3], "layer"):  # one alone: what others would have made is not there
        alone = ffattr.attribute(model, given, scopes=scope, backend="torch", dtype=torch.float64)
        name_of = expected.scopes[-1] if scope == "layer" else scope
        torch.testing.assert_close(alone.maps[name_of], expected.maps[name_of], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_block_reads_its_own_token_alone(name: str) -> None:
    found = ffattr.attribute(build(name), tiny_models.inputs(name, length=LENGTH), scopes="all")
    itself = torch.eye(LENGTH).bool()
    for scope in ("atb_ln", "atb_ln_ff"):
        assert ((found.maps[scope] != 0) == itself).all()
    assert torch.equal(found.maps["atb_ln_ff_res"][..., ~itself], found.maps["atb"][..., ~itself])
    assert found.plan.layers[0].method == "attention"


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_exactly_zero_beyond(name: str) -> None:
    found = ffattr.attribute(build(name), tiny_models.inputs(name, length=LENGTH), scopes="layer")
    apart = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    beyond = [bool((layer[:, apart >= 4] == 0).all()) for layer in found["layer"]]
    assert sorted(beyond) == [False, True]


@pytest.mark.parametrize("name", ["gemma", "nemotron"])
def test_norms_that_add_one_are_asked(name: str) -> None:
    """Their gain is one more than the weight, which nothing but the module says."""
    model = build(name, dtype=torch.float32)
    weights = resolve(model).layers[0].weights(torch.float64)
    assert weights.norm_before_attn is not None
    torch.testing.assert_close(weights.norm_before_attn.weight, 1 + model.layers[0].input_layernorm.weight.double())
    found = ffattr.attribute(model, tiny_models.inputs(name))
    assert found.error.max() < 1e-5
