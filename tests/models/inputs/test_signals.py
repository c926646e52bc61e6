"""Images and recordings: tokens that only the model knows, their names and padding, and what is told where it fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from recording import assert_recomputed, run, state
from tiny_models import IMAGE_FAMILIES, SOUND_FAMILIES, build, samples
from torch import Tensor, nn

import ffattr
from ffattr.errors import CaptureError, UnsupportedModel
from ffattr.models.capture.recorder import record_first_attention, record_layers
from ffattr.models.inputs.prepare import Inputs, prepare_inputs
from ffattr.models.registry import resolve

PATCHES = [f"{row},{column}" for row in range(3) for column in range(3)]


def ready(model: nn.Module, inputs: Any) -> Inputs:
    return prepare_inputs(resolve(model), model, inputs)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("vit")


@pytest.fixture(scope="module")
def wav2vec2() -> nn.Module:
    return build("wav2vec2-stable")


# ---- tokens


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("vit", ["[CLS]"]),
        ("deit", ["[CLS]", "[DIST]"]),
        ("dinov2", ["[CLS]"]),
        ("dinov2-registers", ["[CLS]", "[REG]", "[REG]"]),
        ("beit", ["[CLS]"]),
        ("clip-vision", ["[CLS]"]),
        ("siglip-vision", []),
    ],
)
def test_patches_are_named_by_row_and_column(name: str, special: list[str]) -> None:
    prepared = ready(build(name), tiny_models.inputs(name))
    assert prepared.tokens == [[*special, *PATCHES]] * 2
    assert prepared.mask.shape == (2, len(special) + 9)
    assert prepared.mask.all()


def test_images_of_another_size() -> None:
    model = build("dinov2")
    prepared = ready(model, images(1, 3, 8, 21))  # what is left of a patch is cut off
    assert prepared.tokens == [["[CLS]", *(f"{row},{column}" for row in range(2) for column in range(5))]]
    assert_recomputed(*run("dinov2", model, images(1, 3, 8, 21)))


def test_patches_that_are_not_square() -> None:
    model = build("vit", image_size=(12, 16), patch_size=(6, 4))
    assert ready(model, images(1, 3, 12, 16)).tokens[0][-5:] == ["0,3", "1,0", "1,1", "1,2", "1,3"]


def test_tokens_that_are_no_patches_are_numbered(vit: nn.Module) -> None:
    description = resolve(vit)
    other = ffattr.models.registry.ModelDescription(
        description.base, description.layers, "mine"
    )  # knows of no special tokens
    assert prepare_inputs(other, vit, images(1, 3, 12, 12)).tokens == [[str(position) for position in range(10)]]


@pytest.mark.parametrize("name", SOUND_FAMILIES)
def test_recordings(name: str) -> None:
    model = build(name)
    prepared = ready(model, tiny_models.inputs(name, length=6, padding="right"))
    assert prepared.tokens == [["0", "1", "2", "3", "4", "5"]] * 2
    assert prepared.mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert ready(model, images(1, samples(6) - 1)).mask.tolist() == [[True] * 5]


@pytest.mark.parametrize("scopes", ["layer", "all"])
def test_a_padded_recording_is_that_recording_on_its_own(wav2vec2: nn.Module, scopes: str) -> None:
    given = tiny_models.inputs("wav2vec2-stable", length=7, padding="right")
    padded = ffattr.attribute(wav2vec2, given, scopes=scopes)
    alone = ffattr.attribute(wav2vec2, given["input_values"][1:, : samples(5) + 1], scopes=scopes)
    for scope, expected in alone.maps.items():
        found = padded.maps[scope][:, 1:]
        torch.testing.assert_close(found[..., :5, :5], expected, rtol=0, atol=1e-10)
        assert found[..., 5:, :].abs().max() == 0
        assert found[..., 5:].abs().max() == 0


def test_patches_may_be_masked(vit: nn.Module) -> None:
    attention_mask = torch.ones(2, 10, dtype=torch.long)
    attention_mask[1, 7:] = 0
    given = {"pixel_values": images(2, 3, 12, 12), "attention_mask": attention_mask}
    assert torch.equal(ready(vit, given).mask, attention_mask.bool())
    assert_recomputed(*run("vit", vit, given))


@pytest.mark.parametrize("name", ["dinov2", "beit"])
def test_mask_tokens(name: str) -> None:
    model = build(name, use_mask_token=True)
    given = {"pixel_values": images(1, 3, 12, 12), "bool_masked_pos": torch.arange(9)[None] % 2 == 0}
    description, records, mask = run(name, model, given)
    assert_recomputed(description, records, mask)
    assert not torch.equal(records[0].input, run(name, model, images(1, 3, 12, 12))[1][0].input)


# ---- ways to pass them


@pytest.mark.parametrize("name", ["vit", "wav2vec2"])
def test_a_tensor_is_as_good_as_a_mapping(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name)
    (tensor,) = given.values()
    expected = ffattr.attribute(model, given)
    feature = transformers.BatchFeature({**given, "labels": torch.ones(2)})
    for other in (tensor, feature):
        found = ffattr.attribute(model, other)
        assert found.tokens == expected.tokens
        assert torch.equal(found["layer"], expected["layer"])


def test_vectors_and_plans(vit: nn.Module) -> None:
    pixels = images(1, 3, 12, 12)
    plan = ffattr.plan(vit, pixels, scopes="all", backend="torch")
    found = ffattr.attribute(vit, pixels, scopes="all", backend="torch")
    assert [layer.method for layer in plan.layers] == [layer.method for layer in found.plan.layers]
    vectors = ffattr.vectors(vit, pixels, queries=[0, 9])
    torch.testing.assert_close(vectors.values.norm(dim=-1), found["atb_ln_ff_res"][:, :, [0, 9]], rtol=0, atol=1e-10)


def test_float32(wav2vec2: nn.Module) -> None:
    model = build("wav2vec2-stable", dtype=torch.float32)
    given = tiny_models.inputs("wav2vec2-stable", padding="right")
    found = ffattr.attribute(model, {**given, "input_values": given["input_values"].float()})
    torch.testing.assert_close(
        found["layer"].double(), ffattr.attribute(wav2vec2, given)["layer"], rtol=1e-3, atol=1e-3
    )


# ---- nothing is left behind


@pytest.mark.parametrize("name", [*IMAGE_FAMILIES[::3], *SOUND_FAMILIES[:1]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_looking_ahead_leaves_nothing_behind(name: str, implementation: str) -> None:
    model, given = build(name, attn_implementation=implementation), tiny_models.inputs(name)
    ran: list[nn.Module] = []
    hooks = [spec.module.register_forward_hook(lambda module, *_: ran.append(module)) for spec in resolve(model).layers]
    before = state(model)
    ready(model, given)
    assert state(model) == before
    assert not ran  # not even the first layer ran to its end
    with pytest.raises(ValueError, match="does not run on"):
        ready(model, {next(iter(given)): next(iter(given.values()))[..., :1]})
    assert state(model) == before
    for hook in hooks:
        hook.remove()
    record_layers(resolve(model), given, lambda recorded: None)


def test_another_thread_is_not_stopped(vit: nn.Module) -> None:
    pixels = images(1, 3, 12, 12)
    expected, found = vit(pixels).last_hidden_state, []

    def work() -> None:
        found.append(vit(pixels).last_hidden_state)

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    hook = vit.embeddings.register_forward_hook(meanwhile)
    ready(vit, pixels)
    hook.remove()
    torch.testing.assert_close(found, [expected], rtol=0, atol=1e-12)


def test_training_mode(wav2vec2: nn.Module) -> None:
    """LayerDrop, dropout and the masks of training are random there."""
    given = tiny_models.inputs("wav2vec2-stable")
    wav2vec2.train()
    before = state(wav2vec2)
    try:
        with pytest.raises(CaptureError, match=r"Wav2Vec2Model is in training mode.*model\.eval\(\)"):
            ffattr.attribute(wav2vec2, given)
        assert state(wav2vec2) == before
    finally:
        wav2vec2.eval()


def test_a_model_that_ends_before_its_layers() -> None:
    model = build("vit")
    description = resolve(model)
    model.layers = nn.ModuleList().eval()
    with pytest.raises(CaptureError, match="ViTModel ended before the attention of its first layer"):
        record_first_attention(description, tiny_models.inputs("vit"))


def test_what_no_formula_covers_is_named_as_such(vit: nn.Module) -> None:
    attention = vit.layers[0].attention
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "head_mask": 1}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModel, match="ViTAttention passes 'head_mask' to its attention function"):
        ready(vit, images(1, 3, 12, 12))
    hook.remove()


# ---- errors

PIXELS = images(2, 3, 12, 12)
BAD_IMAGES: list[tuple[Any, type[Exception], str]] = [
    (
        PIXELS[0],
        ValueError,
        r"pixel_values has shape \(3, 12, 12\), expected \[batch, channels, height, width\].*\[None",
    ),
    (PIXELS[0, 0], ValueError, r"pixel_values has shape \(12, 12\), expected \[batch, channels, height, width\]$"),
    (PIXELS[:0], ValueError, r"pixel_values has shape \(0, 3, 12, 12\): it is empty"),
    ((PIXELS * 9).byte(), TypeError, "pixel_values has dtype torch.uint8, expected floats .* image processor"),
    (PIXELS.float(), TypeError, r"pixel_values has dtype torch.float32, but the model has torch.float64. Use .to\("),
    (PIXELS.to("meta"), ValueError, "pixel_values is on meta, but the model is on cpu"),
    (PIXELS[:, :1], ValueError, r"ViTModel does not run on pixel_values \(2, 1, 12, 12\): .*channel"),
    (PIXELS[..., :8], ValueError, r"ViTModel does not run on pixel_values \(2, 3, 12, 8\): Input image size"),
    (
        {"pixel_values": PIXELS, "attention_mask": torch.ones(2, 9)},
        ValueError,
        r"attention_mask has shape \(2, 9\), expected \(2, 10\): pixel_values makes 10 tokens",
    ),
    (
        {"pixel_values": PIXELS, "attention_mask": torch.eye(3, 9)},
        ValueError,
        r"attention_mask has shape \(3, 9\), expected \(2, 10\)",
    ),
    (
        {"pixel_values": PIXELS, "attention_mask": torch.tensor([[1] * 10, [0] * 10])},
        ValueError,
        "batch row 1 is all padding",
    ),
    ({"pixel_values": PIXELS, "bool_masked_pos": torch.ones(2, 9).bool()}, ValueError, "does not run on .*bool_masked"),
    ({"pixel_values": [[1.0]]}, TypeError, r"inputs\['pixel_values'\] is a list, expected a tensor.*processor"),
    (
        {"input_ids": tiny_models.ids(), "pixel_values": PIXELS},
        TypeError,
        "'input_ids', which ViTModel.forward does not",
    ),
    ({"labels": torch.ones(2)}, ValueError, "inputs has nothing, expected 'pixel_values' among its keys"),
    ("a cat", TypeError, "ViTModel takes a float tensor of features, not text"),
    ([PIXELS], TypeError, "inputs is a list, expected a mapping of tensors, or a float tensor pixel_values"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_IMAGES, ids=[message[:40] for *_, message in BAD_IMAGES])
def test_errors_of_images(vit: nn.Module, inputs: Any, error: type[Exception], message: str) -> None:
    before = state(vit)
    with pytest.raises(error, match=message):
        ready(vit, inputs)
    assert state(vit) == before


SOUND = images(2, 60)
BAD_SOUNDS: list[tuple[Any, type[Exception], str]] = [
    (SOUND[0], ValueError, r"input_values has shape \(60,\), expected \[batch, samples\].*input_values\[None\]"),
    (SOUND[None], ValueError, r"input_values has shape \(1, 2, 60\), expected \[batch, samples\]$"),
    (SOUND.short(), TypeError, "input_values has dtype torch.int16, expected floats .* feature extractor"),
    (SOUND[:, :5], ValueError, r"Wav2Vec2Model does not run on input_values \(2, 5\): .*[Kk]ernel size"),
    (
        {"input_values": SOUND, "attention_mask": torch.ones(2, 7)},
        ValueError,
        r"attention_mask has shape \(2, 7\), expected that of input_values: \(2, 60\)",
    ),
    (
        {"input_values": SOUND, "attention_mask": torch.arange(2)[:, None].expand(2, 60)},
        ValueError,
        "batch row 0 is all padding",
    ),
    ({"pixel_values": PIXELS}, TypeError, "'pixel_values', which Wav2Vec2Model.forward does not take"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_SOUNDS, ids=[message[:40] for *_, message in BAD_SOUNDS])
def test_errors_of_recordings(wav2vec2: nn.Module, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ready(wav2vec2, inputs)


def test_images_with_text_are_for_two_towers() -> None:
    both = {**tiny_models.inputs("clip-text"), "pixel_values": PIXELS}
    with pytest.raises(TypeError, match=r"'input_ids', which CLIPVisionModel.forward does not take"):
        ready(build("clip-vision"), both)
    with pytest.raises(TypeError, match=r"'pixel_values', which CLIPTextModel.forward does not take"):
        ready(build("clip-text"), both)
