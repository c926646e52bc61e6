"""`attribute` on Whisper: an encoder of 1500 frames, a decoder, and what the one brings to the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import assert_agree, inputs, load

import ffattr
from ffattr.results import Attribution

FRAMES = 1500
STEPS = {"encoder": 50, "decoder": 1, "cross": 1}  # every how many queries


def attributed(stack: str, **options: Any) -> Attribution:
    queries = slice(None, None, STEPS[stack])
    found: Any = ffattr.attribute(
        load("whisper").model, inputs("whisper"), scopes=f"{stack}.all", queries=queries, **options
    )
    assert list(found.stacks) == [stack]
    attr: Attribution = found.stacks[stack]
    return attr


@pytest.mark.parametrize("stack", STEPS)
def test_every_layer_is_recomputed(stack: str) -> None:
    written = inputs("whisper")["decoder_input_ids"].shape[1]
    shape = (FRAMES // STEPS["encoder"] if stack == "encoder" else written, written if stack == "decoder" else FRAMES)
    attr = attributed(stack)
    assert attr.layers == (0, 1, 2, 3)
    assert 0 < attr.error.max() < 2e-5
    for scope in attr.scopes:
        heads = (6,) if scope.endswith("heads") else ()
        assert attr.maps[scope].shape == (4, 1, *heads, *shape)
        assert attr.maps[scope].isfinite().all()
        assert (attr.maps[scope].sum(-1) > 0).all()


@pytest.mark.parametrize("stack", STEPS)
def test_backends_agree_with_the_definition(stack: str) -> None:
    expected = attributed(stack, layers=[0, 3], backend="reference", dtype=torch.float64)
    for backend in ("torch", "cpu"):
        found = attributed(stack, layers=[0, 3], backend=backend)
        assert found.plan.backend == backend
        assert_agree(found, expected)
