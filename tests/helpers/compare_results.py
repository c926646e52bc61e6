"""Comparisons of whole results: maps and biases of two attributions, descriptions of two models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import tiny_models
import torch

from ffattr import Attribution
from ffattr.models.registry import ModelDescription
from ffattr.ops import backends

BACKENDS = tuple(
    name for name in ("cpu", "torch") if not backends.BACKENDS[name].why_not(torch.device("cpu"), torch.float32)
)

_WAYS = (("torch", "direct"), ("cpu", "operator")), (("torch", "operator"), ("cpu", "direct"))


def ways_of(name: str, padding: str | None, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Returns backends and methods to try with a family, one of ``names``, and a kind of padding: two of the four, so
    that each meets every family, and every kind of padding in another one; all where a family has no other padding."""
    kinds = tiny_models.paddings(name)
    if len(kinds) == 1:
        return _WAYS[0] + _WAYS[1]
    return _WAYS[(list(names).index(name) + kinds.index(padding)) % 2]


def assert_same(found: Attribution, expected: Attribution, limit: float | None = None) -> None:
    """Asserts that maps and biases are within ``limit`` of the largest entry of the layer's scope, their dtype's unless
    given."""
    assert found.scopes == expected.scopes
    for scope in expected.scopes:
        for name in ("maps", "bias"):
            one, other = getattr(found, name)[scope].double(), getattr(expected, name)[scope]
            assert one.shape == other.shape
            bound = limit or (1e-12 if found.maps[scope].dtype == torch.float64 else 1e-5)
            size = other.flatten(1).amax(1).view(-1, *[1] * (other.dim() - 1))
            excess = ((one - other).abs() - bound * size).max()
            assert excess <= 0, f"{name} {scope}: {excess} too far"  # NaN fails too


def assert_same_layers(found: ModelDescription, expected: ModelDescription) -> None:
    """Asserts that two descriptions say the same of every layer."""
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for field in fields(layer):
            a, b = getattr(layer, field.name), getattr(other, field.name)
            assert a is b or a == b, field.name
