"""How models and inputs arrive: offloaded, on two devices, in half precision, compiled, padded, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from recording import state
from tiny_models import build
from torch import Tensor, nn
from two_devices import HERE, THERE, TwoDevices, put, put_module

import ffattr
from ffattr import Attribution

pytestmark = pytest.mark.usefixtures("one_thread")

accelerate: Any = pytest.importorskip("accelerate")


def assert_equal(found: Attribution, expected: Attribution) -> None:
    assert found.scopes == expected.scopes
    for scope in found.scopes:
        assert torch.equal(found.maps[scope], expected.maps[scope]), scope
        assert torch.equal(found.bias[scope], expected.bias[scope]), scope


# ---- offloaded


def offloaded(model: nn.Module, where: str, folder: Path) -> nn.Module:
    if where == "cpu":
        return accelerate.cpu_offload(model)
    if where == "disk":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    (layers,) = (name for name in ("layers", "encoder.layer") if f"{name}.1" in dict(model.named_modules()))
    tops = dict.fromkeys((name for name, _ in model.named_children() if not layers.startswith(name)), "cpu")
    places = {**tops, f"{layers}.0": "disk", f"{layers}.1": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("where", ["cpu", "disk", "mixed"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_offloaded(name: str, where: str, tmp_path: Path) -> None:
    plain, model = build(name), offloaded(build(name), where, tmp_path)
    meta, before = on_meta(model), state(model)
    assert len(meta) >= len(list(plain.parameters())) // 3
    given = tiny_models.inputs(name, padding="left")
    during: list[list[str]] = []
    found = ffattr.attribute(model, given, scopes="all", progress=lambda done, of: during.append(on_meta(model)))
    assert_equal(found, ffattr.attribute(plain, given, scopes="all"))
    assert during == [meta, meta]  # each layer's weights are gone before the next layer
    assert on_meta(model) == meta
    assert state(model) == before
    asked = {"scope": "attn", "queries": [-1]}
    assert torch.equal(ffattr.vectors(model, given, **asked).values, ffattr.vectors(plain, given, **asked).values)
    baseline = torch.full((76 if name == "llama" else 52,), 0.1)
    assert ffattr.plan(model, given, baseline=baseline).device == torch.device("cpu")


@pytest.mark.parametrize("name", ["gemma", "dinov2", "qwen3-moe"])
def test_offloaded_parts(name: str, tmp_path: Path) -> None:
    """Norms that add one, which only they with their weights can say; LayerScale; the parameters of experts."""
    plain, model = (build(name, dtype=torch.float32) for _ in range(2))
    given = {key: one.float() if one.is_floating_point() else one for key, one in tiny_models.inputs(name).items()}
    assert_equal(ffattr.attribute(offloaded(model, "disk", tmp_path), given), ffattr.attribute(plain, given))


def test_offloaded_adapters(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")

    def model() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(build("llama"), config).eval()

    given = tiny_models.inputs("llama")
    expected = ffattr.attribute(model(), given)
    assert not torch.equal(expected["layer"], ffattr.attribute(build("llama"), given)["layer"])
    assert_equal(ffattr.attribute(offloaded(model(), "cpu", tmp_path), given), expected)


def test_loaded_with_a_device_map(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    plain = build("llama", head="ForCausalLM", dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "lm_head"), "disk")
    places |= dict.fromkeys(("model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    settings = {"device_map": places, "offload_folder": tmp_path / "off", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()
    assert next(model.parameters()).is_meta
    given = tiny_models.inputs("llama")
    assert_equal(ffattr.attribute(model, given), ffattr.attribute(plain, given))


def test_an_error_in_between_leaves_weights_offloaded(tmp_path: Path) -> None:
    model = offloaded(build("llama"), "disk", tmp_path)
    meta, before = on_meta(model), state(model)

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ffattr.attribute(model, tiny_models.inputs("llama"), progress=stop)
    assert on_meta(model) == meta
    assert state(model) == before


# ---- on two devices


def test_the_pretended_devices_refuse_to_meet() -> None:
    one, other = torch.ones(3), put(torch.ones(3), THERE)
    with TwoDevices():
        assert (one + other.to(one.device)).device == HERE
        assert (2 * other)[:2].device == one.to(THERE).device == torch.ones(3, device=THERE).device == THERE
        one[1:] = other[1:]
        for meet in (lambda: one + other, lambda: one[other > 0], lambda: one.index_copy_(0, torch.arange(3), other)):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                meet()


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_each_layer_is_computed_where_it_is(name: str, padding: str | None) -> None:
    """The second layer on a device that is only pretended; the result is on the inputs' device."""
    model, given = build(name), tiny_models.inputs(name, padding=padding)
    options: dict[str, Any] = {"scopes": "all", "backend": "torch"}
    expected = ffattr.attribute(model, given, **options)
    vectors = ffattr.vectors(model, given, queries=[-1])
    for part in (model.layers[1], model.norm) if name == "llama" else (model.encoder.layer[1], model.pooler):
        put_module(part)
    with TwoDevices():
        found = ffattr.attribute(model, given, **options)
        moved = ffattr.vectors(model, given, queries=[-1])
    assert_equal(found, expected)
    assert torch.equal(moved.values, vectors.values)


# ---- half precision, compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_half_models_are_decomposed_in_single_precision(name: str, dtype: torch.dtype) -> None:
    """Statistics of norms, slopes and sums: of the same hidden states, maps are those in double precision."""
    model, given = build(name, dtype=dtype), tiny_models.inputs(name, padding="right")
    found = ffattr.attribute(model, given, scopes="all")
    exact = ffattr.attribute(model, given, scopes="all", backend="reference", dtype=torch.float64)
    assert 0 < found.error.max() < 3e-2
    for scope in found.scopes:
        assert found.maps[scope].dtype == torch.float32
        gap = (found.maps[scope] - exact.maps[scope]).abs().max()
        assert gap < 1e-5 * exact.maps[scope].max(), scope


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiled(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name)
    expected = ffattr.attribute(model, given, scopes="all")
    assert_equal(ffattr.attribute(torch.compile(model, backend="eager"), given, scopes="all"), expected)
    model.compile(backend="eager")
    assert_equal(ffattr.attribute(model, given, scopes="all"), expected)


# ---- inputs


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_embeddings_in_place_of_ids(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    embedded = model.get_input_embeddings()(given["input_ids"]).detach()
    found = ffattr.attribute(model, {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]})
    expected = ffattr.attribute(model, given)
    assert_equal(found, expected)
    assert found.tokens[0] == [str(position) for position in range(7)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_left_padding_changes_no_map(name: str) -> None:
    model, ids = build(name), tiny_models.ids(1, 5)
    alone = ffattr.attribute(model, ids)["layer"]
    padded = torch.cat([ids.new_zeros(1, 3), ids], 1)
    found = ffattr.attribute(model, {"input_ids": padded, "attention_mask": (padded > 0).long()})["layer"]
    torch.testing.assert_close(found[:, :, 3:, 3:], alone, rtol=0, atol=1e-5)  # rotations are made in float32
    assert not found[:, :, :3].any()
    assert not found[..., :3].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_texts_packed_into_one_row(name: str) -> None:
    """Positions that start again divide a row, and no token of one text contributes to another's."""
    model, ids = build(name), tiny_models.ids(2, 9)
    lengths = ((4, 5), (2, 7))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    found = ffattr.attribute(model, {"input_ids": ids, "position_ids": positions}, scopes="all")
    assert found.error.max() < 1e-12
    for row, (first, _) in enumerate(lengths):
        for part in (slice(first), slice(first, None)):
            alone = ffattr.attribute(model, ids[row : row + 1, part], scopes="all")
            for scope in found.scopes:
                maps = found.maps[scope][:, row]
                torch.testing.assert_close(maps[..., part, part], alone.maps[scope][:, 0], rtol=0, atol=1e-10)
        for scope in found.scopes:
            maps = found.maps[scope][:, row]
            assert not maps[..., first:, :first].any()
            assert not maps[..., :first, first:].any()


def test_a_cache_is_refused() -> None:
    model: Any = build("llama", head="ForCausalLM")
    ids: Tensor = tiny_models.ids(1, 5)
    past = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="inputs has 'past_key_values': a cache hides the earlier tokens"):
        ffattr.attribute(model, {"input_ids": ids[:, 4:], "past_key_values": past})
    assert_equal(ffattr.attribute(model, {"input_ids": ids, "use_cache": True}), ffattr.attribute(model, ids))
