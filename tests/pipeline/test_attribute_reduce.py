"""`attribute` with ``reduce=``: what the result says of it, its file, its views, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr import Dense, Pool, Reduce, Rows, TopK

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = tiny_models.inputs("bert", padding="right")


@pytest.mark.parametrize("reduction", ["l2", "l1", "alti"])
def test_the_result_and_its_file_say_how_vectors_were_reduced(reduction: str, tmp_path: Path) -> None:
    attr = ffattr.attribute(build("bert"), GIVEN, scopes=["atb", "layer"], reduce=reduction)
    assert attr.reduce == reduction
    assert (f"reduce='{reduction}'" in repr(attr)) == (reduction != "l2")
    assert (f"reduce='{reduction}'" in str(attr.plan)) == (reduction != "l2")
    attr.save(tmp_path / "maps.safetensors")
    found = ffattr.load(tmp_path / "maps.safetensors")
    assert found.reduce == reduction
    assert repr(found) == repr(attr)
    assert torch.equal(found["layer"], attr["layer"])
    assert attr.to_words(words=[[0, 0, 1, 2, 3, 3, 4]] * 2).reduce == reduction


def test_files_of_older_versions_hold_norms(tmp_path: Path) -> None:
    attr = ffattr.attribute(build("bert"), GIVEN)
    del attr.arguments["reduce"]
    attr.save(tmp_path / "maps.safetensors")
    assert ffattr.load(tmp_path / "maps.safetensors").reduce == "l2"


def test_both_stacks_say_so() -> None:
    attr = ffattr.attribute(build("bart"), tiny_models.inputs("bart"), reduce="l1")
    assert attr.reduce == "l1"
    assert {stack.reduce for stack in attr.stacks.values()} == {"l1"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("reduction", "name"), [("l2", "norm"), ("l1", "L1 norm"), ("alti", "ALTI")])
def test_views_name_what_they_show(reduction: str, name: str, tmp_path: Path) -> None:
    attr = ffattr.attribute(build("bert"), GIVEN, scopes=["atb", "layer"], reduce=reduction)
    labels = [axes.get_ylabel() for axes in attr.plot().axes]
    assert (labels[1] == name) == (reduction != "l2")
    attr.to_html(tmp_path / "maps.html")
    assert f'"measure":"{name}"' in (tmp_path / "maps.html").read_text()
    other = attr.plot(colour_label="mine")
    assert other.axes[1].get_ylabel() == "mine"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_what_is_kept_is_cut_from_rows_that_are_complete(name: str, tmp_path: Path) -> None:
    """Shares of rows, before anything of them is left out."""
    model, given = build(name), tiny_models.inputs(name, padding="right")
    options = {"scopes": ["atb", "layer"], "reduce": "alti"}
    whole = ffattr.attribute(model, given, **options)["layer"]
    scope = whole_name = ffattr.attribute(model, given, **options).scope("layer")
    top = ffattr.attribute(model, given, keep=TopK(2), **options).largest[scope]
    torch.testing.assert_close(top.values, whole.topk(2).values, rtol=0, atol=1e-14)
    torch.testing.assert_close(top.total, whole.sum(-1), rtol=0, atol=1e-14)
    pooled = ffattr.attribute(model, given, keep=Pool(7), **options)["layer"][:, 0, 0, 0]
    torch.testing.assert_close(pooled, whole[:, 0].mean((-1, -2)), rtol=0, atol=1e-14)
    dense = ffattr.attribute(model, given, keep=Dense(path=tmp_path / "maps.safetensors"), **options)
    torch.testing.assert_close(dense["layer"], whole, rtol=0, atol=0)
    assert ffattr.load(tmp_path / "maps.safetensors").reduce == "alti"

    def add_up(rows: Rows) -> float:
        return float((rows.maps[whole_name].sum(-1) - 1).abs().max())

    sums = ffattr.attribute(model, given, keep=Reduce(add_up), **options).reduced
    assert max(sums) < 1e-12


def test_rollout_of_alti_is_a_product_of_shares() -> None:
    """What Ferrando et al. 2022 do with their maps."""
    attr = ffattr.attribute(build("bert"), GIVEN, scopes="atb", reduce="alti")
    shares = ffattr.analysis.rollout_maps(attr, "atb")
    torch.testing.assert_close(shares[1, 0], attr["atb"][1, 0] @ attr["atb"][0, 0], rtol=0, atol=1e-12)


def test_the_plan_counts_the_sums_of_vectors() -> None:
    options = {"scopes": ["attn", "atb"], "backend": "torch"}
    found = ffattr.plan(build("bert"), GIVEN, reduce="alti", **options)
    assert str(found).startswith("torch backend, float64 on cpu, reduce='alti'\n")
    work, pairs = found.layers[0].work, int(GIVEN["attention_mask"].sum(1).square().sum())
    assert work["mixing"] == 2 * pairs * 6 * 40 * 2  # five heads and the residual, 40 wide, at two scopes
    assert not {"gram", "form"} & work.keys()
