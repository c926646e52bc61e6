"""`attribute` on trained models and real inputs: float32, as users have them."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from samples import assert_agree, inputs, load
from texts import prose

import ffattr
from ffattr.analysis import contextualization_change

LAYERS = {"minilm": 6, "smollm2": 30, "gemma3": 18, "antiberty": 8, "dinov2": 12}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_recomputed(name: str) -> None:
    given = inputs(name)
    attr = ffattr.attribute(load(name).model, given, scopes="all")
    assert attr.layers == tuple(range(LAYERS[name]))
    assert attr.plan.dtype == torch.float32
    assert 0 < attr.error.max() < 2e-5
    for scope in attr.scopes:
        assert attr.maps[scope].isfinite().all()
        assert (attr.maps[scope].sum(-1) > 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_backends_agree_with_the_definition(name: str) -> None:
    last = LAYERS[name] - 1
    options = {"scopes": "all", "layers": [0, last // 2, last], "queries": slice(None, None, 5)}
    expected = ffattr.attribute(load(name).model, inputs(name), backend="reference", dtype=torch.float64, **options)
    for backend in ("torch", "cpu"):
        for method in ("direct", "operator"):
            found = ffattr.attribute(load(name).model, inputs(name), backend=backend, method=method, **options)
            assert found.plan.backend == backend
            assert_agree(found, expected)


def changes(name: str, layers: list[int]) -> pd.DataFrame:
    attr = ffattr.attribute(load(name).model, prose(load(name)), scopes="all", layers=layers, dtype=torch.float64)
    return contextualization_change(attr).pivot_table(index="layer", columns="component", values="value")


def test_ff_and_norm_undo_each_other_in_the_late_layers_of_minilm() -> None:
    """The finding of Kobayashi et al. 2024 on BERT: each rearranges the map, both together much less."""
    table = changes("minilm", list(range(6)))
    assert (table.loc[[1, 2, 3]] < 0.05).all().all()
    assert (table.loc[[4, 5], ["FF", "LN"]] > 0.08).all().all()
    assert table.loc[5, "FF"] > 0.2
    assert table.loc[5, "FF block"] < 0.5 * table.loc[5, ["FF", "LN"]].min()


def test_smollm2_rearranges_its_map_in_the_first_layer() -> None:
    table = changes("smollm2", [0, 1, 5, 15, 28, 29])
    assert (table.loc[0, ["FF", "FF block"]] > 0.05).all()
    assert (table.loc[1:, "FF block"] < 0.01).all()
    assert (table.loc[5:] < 0.03).all().all()
