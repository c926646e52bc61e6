"""Decomposed vectors: their norms are the maps, their sums the layer's output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr.results.kept import policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-bias"])
def test_vectors(name: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, padding=padding)
    options: dict[str, Any] = {"layers": [1, 0, 1], "queries": [6, 0, 3], "value_bias": "separate", "baseline": "bias"}
    attr = ffattr.attribute(model, given, scopes="all", **options)
    for scope in (*attr.scopes, "layer"):
        found = ffattr.vectors(model, given, scope=scope, **options)
        assert (found.layers, found.queries, found.scope) == ((1, 0, 1), (6, 0, 3), attr.scope(scope))
        torch.testing.assert_close(found.values.norm(dim=-1), attr[scope], rtol=1e-10, atol=1e-12)
        if scope == "attn_heads":
            summed = found.values.sum(2)
            torch.testing.assert_close(summed, ffattr.vectors(model, given, scope="attn", **options).values)
            continue
        torch.testing.assert_close(found.bias.norm(dim=-1), attr.bias[found.scope], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.values.sum(-2) + found.bias, found.total, rtol=0, atol=1e-11)
        assert (found.total[:, ~attr.mask[:, [6, 0, 3]]] == 0).all()
        assert found.mask.equal(attr.mask)
        assert found.key_mask is None


def test_vectors_of_the_layer_are_its_output() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    expected = model(**given, output_hidden_states=True).hidden_states[1:]
    found = ffattr.vectors(model, given)
    torch.testing.assert_close(found.total, torch.stack(expected).detach(), rtol=0, atol=1e-12)


def test_vectors_of_several_scopes() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    found = ffattr.vectors(model, given, scope=["atb_ff", "layer"], queries=[3, 0])
    assert list(found) == ["atb_ff", "atb_ff_res_ln"]
    for name, several in found.items():
        alone = ffattr.vectors(model, given, scope=name, queries=[3, 0])
        assert several.scope == alone.scope == name
        for part in ("values", "bias", "total"):
            assert torch.equal(getattr(several, part), getattr(alone, part))
    with pytest.raises(ValueError, match=r"scopes='all' names 7 scopes, expected one of them, or a list of names"):
        ffattr.vectors(model, given, scope="all")


def test_vectors_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * 2 * 7 * 7 * 40 * 8
    monkeypatch.setattr(policy.psutil, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
    model, given = build("bert"), tiny_models.inputs("bert")
    with pytest.raises(ValueError, match=r"would take 0\.0 GiB, more than the 0\.0 GiB that are free; ask"):
        ffattr.vectors(model, given)
    assert ffattr.vectors(model, given, queries=[0, 1]).values.shape == (2, 2, 2, 7, 40)
    monkeypatch.setattr(policy.psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
    assert ffattr.vectors(model, given).values.shape == (2, 2, 7, 7, 40)


@pytest.mark.parametrize("scope", ["attn", "atb", "layer"])
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "t5"])
def test_vectors_of_a_layer_that_is_not_what_it_seems_are_an_error(name: str, scope: str) -> None:
    """Whichever scope is asked for, also before the part that is different."""
    model, given = build(name), tiny_models.inputs(name)
    asked = f"encoder.{scope}" if name == "t5" else scope
    module = next(m for n, m in model.named_modules() if n.endswith(("down_proj", "output.dense", "experts", ".wo")))
    right = ffattr.vectors(model, given, scope=asked, queries=[2])
    assert "unchecked" not in repr(right)
    module.register_forward_hook(lambda module, args, output: output.abs())
    with pytest.raises(ffattr.FfattrError, match=r"by a hook|the recomputed output differs"):
        ffattr.vectors(model, given, scope=asked, queries=[2])
    found = ffattr.vectors(model, given, scope=asked, queries=[2], check=False)
    assert repr(found).endswith("; unchecked)")


def test_results_that_nobody_checked_say_so() -> None:
    model, given = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    assert repr(ffattr.attribute(model, given, check=False)).endswith("; unchecked)")
    assert repr(ffattr.contributions(model, given, target=3, check=False)).endswith("; unchecked)")
    for found in (ffattr.attribute(model, given), ffattr.contributions(model, given, target=3)):
        assert "unchecked" not in repr(found)


def test_scopes_are_asked_for_by_the_name_that_attribute_has() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    one, same = ffattr.vectors(model, given, scopes="atb"), ffattr.vectors(model, given, scope="atb")
    assert torch.equal(one.values, same.values)
    assert list(ffattr.vectors(model, given, scopes=["atb", "layer"])) == ["atb", "atb_ff_res_ln"]
