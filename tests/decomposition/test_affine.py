"""Norms in two parts: a frozen scale and what is linear."""

from __future__ import annotations

import torch
from plain_layers import WIDTH, random

from ffattr.decomposition.affine import Norm


def test_a_norm_without_parameters_centres_only() -> None:
    p = random(3, WIDTH)
    assert torch.equal(Norm("rms", None, None, 0.0).linear(p), p)
    assert torch.equal(Norm("layer", None, None, 0.0).linear(p), p - p.mean(-1, keepdim=True))


def test_an_offset_is_added_to_the_root() -> None:
    p = random(3, WIDTH)
    spread = p.std(-1, correction=0)
    torch.testing.assert_close(Norm("layer", None, None, 0.0, 0.25).scale(p), 1 / (spread + 0.25))
    torch.testing.assert_close(Norm("layer", None, None, 0.25).scale(p), (spread**2 + 0.25).rsqrt())
