"""`attribute` on Whisper: an encoder of 1500 frames, a decoder, and what the one brings to the other."""

from __future__ import annotations

import functools

import pytest
import torch
from samples import assert_agree, inputs, load

import ffattr
from ffattr.stacks import StackedAttribution

FRAMES = 1500


@functools.cache
def attributed() -> StackedAttribution:
    return ffattr.attribute(load("whisper").model, inputs("whisper"), scopes="all")


@pytest.mark.parametrize("stack", ["encoder", "decoder", "cross"])
def test_every_layer_is_recomputed(stack: str) -> None:
    written = inputs("whisper")["decoder_input_ids"].shape[1]
    shape = {"encoder": (FRAMES, FRAMES), "decoder": (written, written), "cross": (written, FRAMES)}[stack]
    attr = attributed().stacks[stack]
    assert attr.layers == (0, 1, 2, 3)
    assert 0 < attr.error.max() < 2e-5
    for scope in attr.scopes:
        heads = (6,) if scope.endswith("heads") else ()
        assert attr.maps[scope].shape == (4, 1, *heads, *shape)
        assert attr.maps[scope].isfinite().all()
        assert (attr.maps[scope].sum(-1) > 0).all()


@pytest.mark.parametrize(("stack", "step"), [("encoder", 100), ("decoder", 1), ("cross", 1)])
def test_backends_agree_with_the_definition(stack: str, step: int) -> None:
    options = {"scopes": f"{stack}.all", "layers": [0, 3], "queries": slice(None, None, step)}
    model, given = load("whisper").model, inputs("whisper")
    expected = ffattr.attribute(model, given, backend="reference", dtype=torch.float64, **options).stacks
    assert list(expected) == [stack]
    for backend in ("torch", "cpu"):
        found = ffattr.attribute(model, given, backend=backend, **options).stacks
        assert found[stack].plan.backend == backend
        assert_agree(found[stack], expected[stack])
