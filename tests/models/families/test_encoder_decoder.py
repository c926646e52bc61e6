"""Models with an encoder and a decoder: three maps, one stream in the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import ways_of
from recording import state
from tiny_models import ENCODER_DECODERS, MORE_ENCODER_DECODERS, build
from versions import needs

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 6  # of the decoder


def stacks(attr: ffattr.Attribution) -> dict[str, ffattr.Attribution]:
    assert isinstance(attr, ffattr.StackedAttribution)
    return attr.stacks


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_description(name: str) -> None:
    description = resolve(build(name))
    assert description.stacks == {"encoder": range(2), "decoder": range(2, 5)}
    for index, spec in enumerate(description.layers):
        assert (spec.cross is not None) == (index in description.stacks["decoder"])
        assert (spec.gate is not None) == (name == "t5-gated")
        assert (spec.norm_after_ff is not None) == (name == "bart")


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_layers_and_maps(name: str, padding: str | None) -> None:
    """Each layer is reproduced from its record, and all maps are those of the definition."""
    if name.startswith("t5") and padding == "left":
        needs("5.15", "to compute T5's attention in float64, where masked-out tokens are not NaN")
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding=padding)
    before = state(model)
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    read = 9  # tokens of the encoder
    for stack, shape in {"encoder": (2, 2, read, read), "decoder": (3, 2, 6, 6), "cross": (3, 2, 6, read)}.items():
        assert stacks(expected)[stack].maps["atb"].shape == shape
        assert stacks(expected)[stack].error.max() < 1e-10
    for backend, method in ways_of(name, padding, ENCODER_DECODERS):
        found = ffattr.attribute(model, given, scopes="all", backend=backend, method=method, dtype=torch.float64)
        assert found.scopes == expected.scopes
        for scope in found.scopes:
            torch.testing.assert_close(found.maps[scope], expected.maps[scope], rtol=0, atol=1e-10, msg=scope)
            torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)
        for stack in stacks(found).values():
            assert stack.error.max() < 1e-10
    assert state(model) == before


@pytest.mark.parametrize("name", MORE_ENCODER_DECODERS)
def test_families_of_the_same_layers(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding="right")
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=torch.float64)
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    assert max(float(stack.error.max()) for stack in stacks(expected).values()) < 1e-10


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_vectors_of_both_sets_of_keys_add_up(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding="right")
    scopes = [scope.name for scope in resolve(model).layers[-1].own_scopes]
    for scope in scopes[scopes.index("atb") :]:
        own, across = (ffattr.vectors(model, given, scope=f"{place}.{scope}") for place in ("decoder", "cross"))
        assert across.values.shape[-2] == 9
        torch.testing.assert_close(own.bias, across.bias)
        together = own.values.sum(-2) + across.values.sum(-2) + own.bias
        torch.testing.assert_close(together, own.total, rtol=0, atol=1e-10)
    attention = ffattr.vectors(model, given, scope="cross.attn")
    torch.testing.assert_close(attention.values.sum(-2) + attention.bias, attention.total, rtol=0, atol=1e-10)
    heads = ffattr.vectors(model, given, scope="cross.attn_heads")
    torch.testing.assert_close(heads.values.sum(2), attention.values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_padding(name: str) -> None:
    """Rows and keys of padding are zero, each by its own mask, and all others are those of the sequence alone."""
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding="right")
    found = ffattr.attribute(model, given, scopes="layer")
    for stack in stacks(found).values():
        keys = stack.mask if stack.key_mask is None else stack.key_mask
        expected = stack.mask[:, :, None] & keys[:, None]
        assert ((stack["layer"] != 0).any(0) <= expected).all()
        assert (stack["layer"] != 0).all(0).diagonal(dim1=1, dim2=2)[..., :4].all()
    cross = stacks(found)["cross"]
    assert cross.key_mask is not None
    assert cross.key_mask[1].tolist() == [True] * 8 + [name == "whisper"]
    assert cross.mask[1].tolist() == [True] * 4 + [False] * 2
    alone = {key: value[1:] for key, value in given.items()}
    for key in alone:
        if key.startswith("decoder"):
            alone[key] = alone[key][:, :4]
        elif key != "input_features":
            alone[key] = alone[key][:, :8]
    short = ffattr.attribute(model, alone, scopes="layer")
    for scope in found.scopes:
        rows, columns = short.maps[scope].shape[-2:]
        torch.testing.assert_close(found.maps[scope][:, 1:, :rows, :columns], short.maps[scope], rtol=0, atol=1e-8)


def test_scopes_of_one_place() -> None:
    model, given = build("bart"), tiny_models.inputs("bart", length=LENGTH)
    only = ffattr.attribute(model, given, scopes="cross.layer", layers=-1, queries=[2])
    assert only.scopes == ("cross.atb_ff_res_ln",)
    assert only.maps["cross.atb_ff_res_ln"].shape == (1, 2, 1, 9)
    assert only.layers == (2,)
    every = ffattr.attribute(model, given, scopes="all")
    torch.testing.assert_close(only["cross.layer"][0], every["cross.layer"][2, :, 2:3])
    some = ffattr.attribute(model, given, scopes=["encoder.atb", "decoder.atb_ff", "cross.atb_ff"])
    assert some.scopes == ("encoder.atb", "decoder.atb_ff", "cross.atb_ff")
    for scope in some.scopes:
        torch.testing.assert_close(some.maps[scope], every.maps[scope])
    assert "2 x encoder layer" not in str(stacks(some)["decoder"].plan)
    assert "decoder layer 0-2" in str(stacks(some)["decoder"].plan)
    assert [stacks(every)[name].arguments["causal"] for name in ("encoder", "decoder", "cross")] == [False, True, False]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_explained_is_what_runs(name: str) -> None:
    """The keys of a decoder are its own tokens, up to the query, and all of the encoder's."""
    model, given = build(name), tiny_models.inputs(name, length=LENGTH)
    ran = ffattr.attribute(model, given)
    shapes = [layer.shape for stack in ("encoder", "decoder") for layer in stacks(ran)[stack].plan.layers]
    assert [layer.shape for layer in ffattr.plan(model, given).layers] == shapes
    assert (shapes[-1].sequences, shapes[-1].tokens, shapes[-1].pairs) == (2, 2 * (6 + 9), 2 * (21 + 6 * 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scopes": "cross.atb_ln"},
            "unknown scope 'cross.atb_ln'; .*encoder: attn_heads, .*; cross: attn_heads, attn",
        ),
        ({"scopes": "atb_ln"}, "unknown scope 'atb_ln'"),
        ({"scopes": "middle.atb"}, "unknown scope 'middle.atb'"),
        ({"baseline": torch.zeros(52)}, r"baseline has shape \[52\], expected \[44\] in decoder layer 0"),
        ({"layers": 2}, "encoder layers has 2, but there are 2"),
        ({"queries": 7, "scopes": "decoder.atb"}, "decoder queries has 7, but there are 6"),
    ],
)
def test_errors_of_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        ffattr.attribute(build("bart"), tiny_models.inputs("bart", length=LENGTH), **changes)


def without(name: str, *keys: str, **more: Any) -> dict[str, Any]:
    given = tiny_models.inputs(name, length=LENGTH)
    return {key: value for key, value in given.items() if key not in keys} | more


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (without("t5", "decoder_input_ids"), ValueError, "no 'decoder_input_ids', the tokens that the decoder reads"),
        (torch.arange(5)[None], ValueError, "no 'decoder_input_ids'"),
        (without("t5", "input_ids"), ValueError, "expected 'input_ids' among its keys"),
        (without("t5", encoder_outputs=(torch.zeros(2, 9, 40),)), ValueError, "leave out the encoder's layers"),
        (without("t5", decoder_input_ids=torch.zeros(2, 6)), TypeError, "decoder_input_ids has dtype torch.float32"),
        (
            without("t5", decoder_attention_mask=torch.ones(2, 5)),
            ValueError,
            r"decoder_attention_mask has shape \(2, 5\)",
        ),
        (without("t5", decoder_attention_mask=torch.zeros(2, 6)), ValueError, "batch row 0 is all padding"),
        (
            without("t5", decoder_input_ids=torch.full((2, 6), 99)),
            ValueError,
            r"decoder_input_ids\[0, 0\] is 99, outside",
        ),
        (
            without("t5", "decoder_attention_mask", decoder_input_ids=torch.ones(1, 6).long()),
            ValueError,
            "2 sequences for the encoder and 1 for the decoder",
        ),
    ],
)
def test_errors_of_inputs(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ffattr.attribute(build("t5"), given)


def test_learned_positions_of_each_stack() -> None:
    given = without("bart", "decoder_attention_mask", decoder_input_ids=torch.ones(2, 40).long())
    with pytest.raises(ValueError, match="decoder_input_ids have 40 tokens, but BartModel has 32 learned positions"):
        ffattr.attribute(build("bart"), given)


def test_labels_are_what_the_decoder_reads_one_token_later() -> None:
    model = build("t5", head="ForConditionalGeneration")
    labels = tiny_models.ids(2, LENGTH)
    read = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], 1)
    given = without("t5", "decoder_input_ids", "decoder_attention_mask")
    found = ffattr.attribute(model, {**given, "labels": labels})
    expected = ffattr.attribute(model, {**given, "decoder_input_ids": read})
    torch.testing.assert_close(found["cross.layer"], expected["cross.layer"])


def test_heads_and_the_encoder_alone() -> None:
    given = tiny_models.inputs("t5", length=LENGTH)
    whole = build("t5", head="ForConditionalGeneration")
    encoder = build("t5", head="EncoderModel")
    encoder.load_state_dict(whole.state_dict(), strict=False)
    alone = ffattr.attribute(encoder, {key: given[key] for key in ("input_ids", "attention_mask")}, scopes="all")
    both = ffattr.attribute(whole, given, scopes="all")
    for scope, tile in alone.maps.items():
        torch.testing.assert_close(both.maps[f"encoder.{scope}"], tile)


def test_a_decoder_with_cross_attention_but_no_encoder() -> None:
    """Its cross-attention does not run: what is left is found by structure, and is what a decoder without it has."""
    model, plain = build("bert", is_decoder=True, add_cross_attention=True), build("bert", is_decoder=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    found = ffattr.attribute(model, tiny_models.inputs("bert"))
    assert found.arguments["model"] == "structure of BertModel"
    expected = ffattr.attribute(plain, tiny_models.inputs("bert"))
    torch.testing.assert_close(found["layer"], expected["layer"], rtol=1e-12, atol=1e-12)


def test_files_and_views(tmp_path: Path) -> None:
    model, given = build("whisper"), tiny_models.inputs("whisper", length=LENGTH, padding="right")
    attr = ffattr.attribute(model, given, scopes=["attn_heads", "layer"])
    path = tmp_path / "speech.safetensors"
    attr.save(path)
    loaded = ffattr.load(path)
    assert repr(loaded) == repr(attr)
    assert loaded.scopes == attr.scopes
    for scope in attr.scopes:
        assert torch.equal(loaded.maps[scope], attr.maps[scope])
        assert torch.equal(loaded.bias[scope], attr.bias[scope])
    cross = stacks(loaded)["cross"]
    assert cross.key_mask is not None
    assert torch.equal(cross.key_mask, torch.ones(2, 9).bool())
    assert cross.key_tokens == [[str(place) for place in range(9)]] * 2
    assert loaded["cross.layer"] is cross["layer"]
    with pytest.raises(KeyError, match="no scope 'layer' here: begin it with one of encoder"):
        loaded["layer"]
    frame = loaded.to_pandas("cross.layer")
    assert len(frame) == 3 * (6 + 4) * 9
    assert set(frame["stack"]) == {"cross"}
    row = frame[(frame["layer"] == 2) & (frame["batch"] == 1) & (frame["query"] == 3) & (frame["key"] == 8)]
    assert float(row["norm"].iloc[0]) == pytest.approx(float(cross["layer"][2, 1, 3, 8]), rel=1e-6)
    assert set(loaded.to_pandas()["stack"]) == {"encoder", "decoder", "cross"}
    figure = loaded.plot("cross.layer", layer=1, batch=1)
    axes = figure.axes[0]
    assert axes.get_title() == "cross: atb_ln_ff_res, layer 1"
    assert axes.images[0].get_array().shape == (4, 9)


def test_a_decoder_of_another_name_is_missed() -> None:
    model = build("bart")
    model.second = model.decoder
    del model.decoder
    with pytest.raises(UnsupportedModel, match=r"BartModel has no 'decoder\.layers'"):
        resolve(model)
