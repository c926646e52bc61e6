"""What else than norms vectors are reduced to, through `ffattr.attribute`: against `ffattr.vectors`, materialised."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import BACKENDS
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr import Attribution
from ffattr.pipeline.vectors import Vectors

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

REDUCTIONS = ("l1", "alti")
WAYS = [*((backend, method) for backend in BACKENDS for method in ("direct", "operator")), ("reference", "auto")]
APART = ("attn_heads", "_experts")


def define(vectors: Tensor, total: Tensor, reduction: str) -> Tensor:
    """Of vectors ``[..., T, d]`` what the definition says, ``[..., T]``, of ALTI without the sums of rows."""
    if reduction == "l1":
        return vectors.abs().sum(-1)
    whole = total[..., None, :]
    return (whole.abs().sum(-1) - (whole - vectors).abs().sum(-1)).clamp_min(0)


def expect(found: dict[str, Vectors], reduction: str, groups: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps and biases by scope, straight from the vectors. ``groups`` ``[T]``: the columns of tokens of all
    sequences."""
    expected = {}
    for scope, one in found.items():
        values, apart = one.values, scope.endswith(APART)
        total = values.sum(-2) if apart else one.total
        if groups is not None:
            summed = values.new_zeros(*values.shape[:-2], int(groups.max()) + 1, values.shape[-1])
            values = summed.index_add_(-2, groups[groups >= 0], values[..., groups >= 0, :])
        bias = define(one.bias[..., None, :], total, reduction)[..., 0] if not apart else one.bias.abs().sum(-1)
        expected[scope] = define(values, total, reduction), bias
    if reduction == "alti":
        rows = {scope: maps.sum(-1) for scope, (maps, _) in expected.items()}
        for scope in expected:
            parts = [scope]
            twin = scope.removeprefix("cross.") if scope.startswith("cross.") else f"cross.{scope}"
            if twin in expected and not scope.removeprefix("cross.").startswith("attn"):
                parts.append(twin)
            sums = sum((rows[part] for part in parts), torch.zeros(()))
            sums = torch.where(sums == 0, 1, sums)
            maps, bias = expected[scope]
            expected[scope] = maps / sums[..., None], bias if scope.endswith(APART) else bias / sums
    return expected


def names_of(attr: Attribution) -> dict[str, str]:
    """What `ffattr.vectors` calls the scopes of a result."""
    return {name: name.removeprefix("decoder.") for name in attr.scopes}


def compare(attr: Attribution, expected: dict[str, tuple[Tensor, Tensor]], limit: float) -> None:
    for name, plain in names_of(attr).items():
        for found, wanted in zip((attr.maps[name], attr.bias[name]), expected[plain], strict=True):
            assert found.shape == wanted.shape
            size = wanted.flatten(1).amax(1).view(-1, *[1] * (wanted.dim() - 1))
            assert ((found.double() - wanted).abs() <= limit * size).all(), name


CASES: dict[str, Any] = {
    "bert": "all",
    "gpt2": "all",
    "llama-bias": "all",
    "mistral": "all",
    "gemma2": "all",
    "gpt-neox": "all",
    "torch-pre": "all",
    "mixtral": ["all", "atb_ln_ff_experts"],
    "bart": ["decoder.all", "cross.all"],
    "t5": ["decoder.all", "cross.all"],
}


def materialise(model: nn.Module, given: Any, scopes: Any, **options: Any) -> dict[str, Vectors]:
    found = ffattr.vectors(model, given, scope=[scopes] if isinstance(scopes, str) else scopes, **options)
    return found


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name: str, padding: str | None) -> None:
    model, given, scopes = build(name), tiny_models.inputs(name, padding=padding), CASES[name]
    vectors = materialise(model, given, scopes)
    for reduction in REDUCTIONS:
        expected = expect(vectors, reduction)
        for backend, method in WAYS:
            options: dict[str, Any] = {"scopes": scopes, "backend": backend, "method": method, "reduce": reduction}
            compare(ffattr.attribute(model, given, dtype=torch.float64, **options), expected, 1e-12)


@pytest.mark.parametrize("name", ["bert", "llama-bias", "gpt-neox", "bart"])
def test_float32_is_close(name: str) -> None:
    """ALTI adds up numbers of both signs, and rounding errors grow by what cancels."""
    model, given, scopes = build(name), tiny_models.inputs(name), CASES[name]
    vectors = materialise(model, given, scopes)
    for reduction, limit in (("l1", 1e-5), ("alti", 5e-5)):
        expected = expect(vectors, reduction)
        for backend, method in WAYS:
            options: dict[str, Any] = {"scopes": scopes, "backend": backend, "method": method, "reduce": reduction}
            compare(ffattr.attribute(model, given, dtype=torch.float32, **options), expected, limit)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ["pairs", "mixed"])
@pytest.mark.parametrize("name", ["bert", "llama-bias", "mixtral", "t5"])
def test_other_methods(name: str, method: str, reduction: str) -> None:
    scopes = ["decoder.all", "cross.all"] if name == "t5" else "all"
    model, given = build(name), tiny_models.inputs(name)
    expected = expect(materialise(model, given, scopes), reduction)
    for backend in BACKENDS:
        found = ffattr.attribute(model, given, scopes=scopes, backend=backend, method=method, reduce=reduction)
        compare(found, expected, 1e-12)


GROUPS = [0, 0, 1, -1, 1, 0, 2]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["bert", "llama-bias", "gemma2", "gpt-neox"])
def test_groups(name: str, reduction: str) -> None:
    """Vectors are added up first. Tokens that are left out are part of the whole, and of no row's sum."""
    model, given, groups = build(name), tiny_models.inputs(name), torch.tensor(GROUPS)
    expected = expect(materialise(model, given, "all"), reduction, groups)
    for backend in (*BACKENDS, "reference"):
        options: dict[str, Any] = {"scopes": "all", "backend": backend, "reduce": reduction}
        found = ffattr.attribute(model, given, groups=groups.expand(2, -1), **options)
        compare(found, expected, 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["bert", "mistral", "gpt-neox", "mixtral"])
def test_blocks_and_queries_do_not_show(name: str, reduction: str) -> None:
    model, given, scopes = build(name), tiny_models.inputs(name, length=9, padding="left"), CASES[name]
    options: dict[str, Any] = {"scopes": scopes, "layers": 1, "method": "direct", "reduce": reduction}
    whole = ffattr.attribute(model, given, memory_budget=1 << 30, **options)
    with pytest.raises(ValueError, match="memory_budget") as caught:
        ffattr.plan(model, given, memory_budget=1, **options)
    least = int(re.findall(r"\d+", str(caught.value))[-1])
    some = ffattr.attribute(model, given, memory_budget=least, queries=[7, 2, -1], **options)
    blocks = some.plan.layers[0].blocks  # type: ignore[attr-defined]
    assert blocks.queries < 3
    assert min(blocks.keys, blocks.ff_keys) < 9
    for scope in whole.scopes:
        rows = whole.maps[scope][..., [7, 2, -1], :]
        torch.testing.assert_close(some.maps[scope], rows, rtol=0, atol=1e-12 * rows.max().item())


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_rows_of_alti_are_shares(name: str) -> None:
    scopes = ["decoder.all", "cross.all"] if name == "bart" else "all"
    attr = ffattr.attribute(build(name), tiny_models.inputs(name, padding="right"), scopes=scopes, reduce="alti")
    for scope in attr.scopes:
        rows = attr.maps[scope].sum(-1)
        if name == "bart" and "attn" not in scope:
            place, plain = scope.split(".")
            rows = rows + attr.maps[f"{'cross' if place == 'decoder' else 'decoder'}.{plain}"].sum(-1)
        real = attr.mask[None, :, None] if "heads" in scope else attr.mask
        torch.testing.assert_close(rows, real.expand_as(rows).to(rows), rtol=0, atol=1e-12)


def test_one_part_of_a_decoder_is_what_it_is_beside_the_other() -> None:
    """The sum of a row is that of both, also where only one was asked for."""
    model, given = build("bart"), tiny_models.inputs("bart")
    both = ffattr.attribute(model, given, scopes=["decoder.all", "cross.all"], reduce="alti")
    for backend in (*BACKENDS, "reference"):
        for scope in ("cross.atb", "decoder.atb_ff_res_ln", "cross.attn_res"):
            alone = ffattr.attribute(model, given, scopes=scope, reduce="alti", backend=backend)
            assert alone.scopes == (scope,)
            torch.testing.assert_close(alone.maps[scope], both.maps[scope], rtol=0, atol=1e-12)
            torch.testing.assert_close(alone.bias[scope], both.bias[scope], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_texts_of_several_lengths_share_a_pack(reduction: str) -> None:
    """Short sequences are worked on together."""
    model, given = build("bert"), tiny_models.inputs("bert", padding="right")
    together = ffattr.attribute(model, given, scopes="all", reduce=reduction)
    assert together.plan.layers[0].shape.sequences == 2  # type: ignore[attr-defined]
    for row in range(2):
        real = given["attention_mask"][row].bool()
        alone = ffattr.attribute(model, given["input_ids"][row : row + 1, real], scopes="all", reduce=reduction)
        for scope in alone.scopes:
            found = together.maps[scope][:, row : row + 1][..., real, :][..., real]
            torch.testing.assert_close(found, alone.maps[scope], rtol=0, atol=1e-12 * found.max().item())
