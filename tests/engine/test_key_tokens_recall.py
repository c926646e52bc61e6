"""Matrices of the weights alone come from whoever runs the engine, and from nowhere else."""

from __future__ import annotations

import random_layers
import torch
from torch import Tensor

from ffattr.engine.ff_operands import FFOperands
from ffattr.engine.key_tokens import Make, attention_paths, make_anew
from ffattr.ops.backends import BACKENDS


def test_nothing_is_kept() -> None:
    made = [[torch.ones(1)], [torch.zeros(1)]]
    assert make_anew("name", made.pop) == [torch.zeros(1)]
    assert make_anew("name", made.pop) == [torch.ones(1)]


def test_operands_are_what_is_recalled() -> None:
    layer = random_layers.layer(norms="pre")
    kept: dict[str, list[Tensor]] = {}

    def recall(name: str, make: Make) -> list[Tensor]:
        return kept.setdefault(name, make())

    def operands(dtype: torch.dtype) -> FFOperands:
        paths = list(attention_paths(layer.weights, recall))
        return FFOperands(layer.weights, paths, BACKENDS["torch"], dtype, recall)

    first = operands(torch.float64)
    assert first.maps
    assert first.down
    names = set(kept)
    assert names == {"own 1", "maps torch.float64", "down torch.float64"}
    again = operands(torch.float64)
    assert again.maps[0] is first.maps[0]
    assert again.down[0][0] is first.down[0][0]
    assert again.paths[0].ff_input.matrix is first.paths[0].ff_input.matrix
    assert operands(torch.float32).maps[0].dtype == torch.float32  # not those in another dtype


def test_experts_are_not_recalled() -> None:
    layer = random_layers.layer(norms="pre", experts=4)
    names: list[str] = []

    def recall(name: str, make: Make) -> list[Tensor]:
        names.append(name)
        return make()

    FFOperands(layer.weights, list(attention_paths(layer.weights)), BACKENDS["torch"], torch.float64, recall)
    operands = FFOperands(layer.weights, list(attention_paths(layer.weights)), BACKENDS["torch"], torch.float64, recall)
    operands.load_experts((0, 1))
    assert operands.down
    operands.load_experts((2, 3))
    assert operands.down
    assert names == []
