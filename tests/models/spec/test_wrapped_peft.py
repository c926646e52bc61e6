"""Models with adapters of PEFT: the layers that run, and what each adapter adds to which projection."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run, state
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr import CaptureError, UnsupportedModel
from ffattr.models.registry import resolve

peft: Any = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # PEFT's, about settings

LORA = {"r": 3, "lora_dropout": 0.3}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """What PEFT has added and would train, which begins without any effect."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            factor = "magnitude" in name or "ia3" in name
            parameter.copy_(parameter * (1 + 0.3 * noise.tanh()) if factor else 0.3 * noise)


def description(name: str, config: Any, **options: Any) -> Any:
    model = peft.get_peft_model(build(name, **options), config)
    randomise(model)
    return model.eval()


KINDS: dict[str, tuple[str, Any]] = {
    "lora": ("llama-bias", peft.LoraConfig(**LORA, target_modules="all-linear")),
    "fused": ("gpt2", peft.LoraConfig(**LORA, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "rank-stabilised": ("llama", peft.LoraConfig(**LORA, target_modules=["v_proj", "down_proj"], use_rslora=True)),
    "biases": ("bert", peft.LoraConfig(**LORA, target_modules=["value", "dense"], lora_bias=True)),
    "first biases": ("llama", peft.LoraConfig(**LORA, target_modules=["v_proj", "up_proj"], lora_bias=True)),
    "dora": ("llama-bias", peft.LoraConfig(**LORA, target_modules=["v_proj", "up_proj"], use_dora=True)),
    "ia3": ("bert", peft.IA3Config(target_modules=["value", "output.dense"], feedforward_modules=["output.dense"])),
    "loha": ("bert", peft.LoHaConfig(r=3, target_modules=["value", "dense"])),
    "oft": ("bert", peft.OFTConfig(r=0, oft_block_size=4, target_modules=["value"])),
    "copies": ("llama", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj", "input_layernorm"])),
    "norms": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "torch": ("torch-pre", peft.LoraConfig(**LORA, target_modules=["linear1", "linear2"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_reproduced(kind: str) -> None:
    name, config = KINDS[kind]
    model = description(name, config)
    before = state(model)
    plain, recorded, _ = run(name, build(name))
    found, records, mask = run(name, model)
    assert_recomputed(found, records, mask)
    assert found.family == plain.family
    assert (records[-1].output - recorded[-1].output).norm() > 1e-2 * recorded[-1].output.norm()
    assert state(model) == before


@pytest.mark.parametrize("kind", ["lora", "dora", "fused"])
def test_maps_are_those_of_the_merged_model(kind: str) -> None:
    name, config = KINDS[kind]
    model, given = description(name, config), tiny_models.inputs(name, padding="right")
    found = ffattr.attribute(model, given, scopes="all")
    merged = ffattr.attribute(model.merge_and_unload(), given, scopes="all")
    for scope in found.scopes:
        torch.testing.assert_close(found.maps[scope], merged.maps[scope], rtol=1e-10, atol=1e-11)


def value_of(model: nn.Module, layer: int = 0) -> Tensor:
    return resolve(model).layers[layer].weights(torch.float64).value.weight


def test_which_adapters_are_active() -> None:
    plain, untouched = (value_of(build("llama", head="ForCausalLM"), layer) for layer in (0, 1))
    config = peft.LoraConfig(r=3, target_modules=["v_proj"], layers_to_transform=[0])
    model = description("llama", config, head="ForCausalLM")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], use_rslora=True))
    model.set_adapter("other")
    randomise(model.eval())
    second = value_of(model) - plain
    assert (value_of(model, 1) - untouched).norm() > 0.1 * untouched.norm()
    model.set_adapter("default")
    first = value_of(model) - plain
    assert first.norm() > 0.1 * plain.norm()
    assert (first - second).norm() > 0.1 * first.norm()
    assert torch.equal(value_of(model, 1), untouched)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(value_of(model), plain + first + second, rtol=0, atol=1e-12)
    assert_recomputed(*run("llama", model))
    with model.disable_adapter():
        assert torch.equal(value_of(model), plain)
        assert_recomputed(*run("llama", model))
    model.merge_adapter()
    torch.testing.assert_close(value_of(model), plain + first + second, rtol=0, atol=1e-12)
    assert_recomputed(*run("llama", model))


def test_copies_that_do_not_run() -> None:
    """Those of an adapter that is switched off, and of one that has none where another is active too."""
    model = description("llama", KINDS["copies"][1])
    plain = value_of(build("llama"))
    copied = value_of(model)
    assert not torch.equal(copied, plain)
    with model.disable_adapter():
        assert torch.equal(value_of(model), plain)
    assert torch.equal(value_of(model), copied)


def test_every_way_in() -> None:
    """A head, PEFT's inner model, one with adapters of several kinds, and those that transformers adds by itself."""
    config = peft.LoraConfig(**LORA, target_modules=["v_proj"])
    head = description("llama", config, head="ForCausalLM")
    given = tiny_models.inputs("llama")
    expected = ffattr.attribute(head, given)
    assert torch.equal(ffattr.attribute(head.base_model, given)["layer"], expected["layer"])
    assert torch.equal(ffattr.attribute(torch.compile(head, backend="eager"), given)["layer"], expected["layer"])
    own = build("llama")
    own.add_adapter(config)
    mixed = peft.get_peft_model(build("llama"), config, mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=3, target_modules=["v_proj"]))
    mixed.set_adapter(["default", "other"])
    for model in (own, mixed):
        randomise(model)
        assert_recomputed(*run("llama", model.eval()))


def changes_more(kind: str) -> Any:
    if kind == "LORA with invocation tokens":
        return peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5], target_modules=["v_proj"])
    if kind == "ADAPTION_PROMPT":
        return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    config = peft.PromptTuningConfig if kind == "PROMPT_TUNING" else peft.PrefixTuningConfig
    return config(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "LORA with invocation tokens"])
def test_adapters_that_change_more_than_layers(kind: str) -> None:
    model = build("llama", head="ForCausalLM", dtype=torch.float32)
    model = peft.get_peft_model(model, changes_more(kind)).eval()
    with pytest.raises(UnsupportedModel, match=f"adapter 'default' of PeftModelForCausalLM is {kind}, which adds"):
        ffattr.attribute(model, tiny_models.inputs("llama"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_mode_is_what_is_refused(kind: str) -> None:
    """Not the dropout that makes a layer look as if it were not linear."""
    name, config = KINDS[kind]
    with pytest.raises(CaptureError, match="training mode"):
        ffattr.attribute(description(name, config).train(), tiny_models.inputs(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_half_models(kind: str, dtype: torch.dtype) -> None:
    """The product of LoRA's two matrices is not rounded; kinds that are asked for theirs round it once or twice."""
    name, config = KINDS[kind]
    model = description(name, config, dtype=dtype)
    exact = value_of(description(name, config, dtype=dtype).to(torch.float64))
    assert (value_of(model) - exact).norm() <= (1e-12 if kind == "lora" else torch.finfo(dtype).eps) * exact.norm()
    found = ffattr.attribute(model, tiny_models.inputs(name))
    assert found["layer"].dtype == torch.float32
    assert 0 < found.error.max() < 3e-2


def test_adapters_on_experts() -> None:
    """PEFT keeps them around the module that has the parameters of all experts, one for each parameter."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    model = description("mixtral", config)
    found = ffattr.attribute(model, tiny_models.ids(), scopes="all")
    assert float(found.error.max()) < 1e-10
    merged = ffattr.attribute(model.merge_and_unload(), tiny_models.ids(), scopes="all")
    without = ffattr.attribute(build("mixtral"), tiny_models.ids(), scopes="all")
    for scope in found.scopes:
        torch.testing.assert_close(found[scope], merged[scope], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found["layer"], without["layer"])
