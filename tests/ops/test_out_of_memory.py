"""Memory that runs out: smaller blocks, the same result, and an error that says what to do where none are left."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from recording import state
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr import FfattrError, OutOfMemory
from ffattr.decomposition import reference
from ffattr.ops import backends, out_of_memory, torch_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 9


class Small:
    """Operators with room for ``pairs`` (query, key) pairs at a time."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.refused = 0
        self._last: weakref.ref[Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        def call(alpha: Tensor, *others: Any) -> Any:
            assert self._last is None or self._last() is None, "what the failed run held is not free"
            if "norms" in name and alpha[0].numel() > self.pairs:
                self.refused += 1
                self._last = weakref.ref(alpha)
                raise torch.OutOfMemoryError(f"CUDA out of memory: {alpha[0].numel()} pairs")
            return getattr(torch_kernels, name)(alpha, *others)

        return call


def limit(monkeypatch: pytest.MonkeyPatch, pairs: int) -> Small:
    operators = Small(pairs)
    monkeypatch.setitem(backends.BACKENDS, "torch", replace(backends.BACKENDS["torch"], load=lambda: operators))
    return operators


def attribute(model: nn.Module, **options: Any) -> Any:
    given = tiny_models.inputs("bert", length=TOKENS, padding="right")
    return ffattr.attribute(model, given, scopes="all", backend="torch", **options)


@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize(("pairs", "halvings"), [(80, 1), (20, 3), (9, 4), (4, 6), (1, 8)])
def test_smaller_blocks_give_the_same_result(
    pairs: int, halvings: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("bert")
    before, parameters = state(model), [parameter.clone() for parameter in model.parameters()]
    whole = attribute(model, method=method)
    operators = limit(monkeypatch, pairs)
    found = attribute(model, method=method)
    assert operators.refused > 0
    for scope in whole.scopes:
        torch.testing.assert_close(found.maps[scope], whole.maps[scope], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.bias[scope], whole.bias[scope], rtol=1e-12, atol=1e-12)
    assert found.error.max() < 1e-12
    assert state(model) == before
    assert all(map(torch.equal, parameters, model.parameters()))
    assert len(found.plan.layers) == 2  # two layers of two sequences together
    first = found.plan.layers[0]
    assert (first.halvings, first.shape.sequences, first.shape.tokens) == (halvings, 2, 9 + 7)
    assert first.blocks.queries * min(9, max(first.blocks.keys, first.blocks.ff_keys)) <= pairs
    assert first.bytes < whole.plan.layers[0].bytes
    assert f"halved {halvings} time" in str(found.plan)


def test_enough_memory_halves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, (TOKENS + TOKENS - 2) * TOKENS)
    assert "halved" not in str(attribute(build("bert")).plan)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float64, " or dtype=torch.float32"), (torch.float32, " or dtype=torch.bfloat16"), (torch.bfloat16, "")],
)
def test_no_room_for_a_single_pair(dtype: torch.dtype, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    before = state(model)
    limit(monkeypatch, 0)
    with pytest.raises(OutOfMemory) as caught:
        attribute(model, layers=1, dtype=dtype)
    assert isinstance(caught.value, FfattrError)
    assert isinstance(caught.value, MemoryError)
    given = tiny_models.inputs("bert", length=TOKENS, padding="right")
    plan = ffattr.plan(model, given, layers=1, dtype=dtype, backend="torch", scopes="all").layers[0]
    while (smaller := plan.halve_blocks()) is not None:
        plan = smaller
    message = str(caught.value)
    assert message.startswith(f"layer 1 ran out of memory: the smallest blocks need {plan.bytes} bytes by the plan, ")
    assert f"fewer layers or queries, pass shorter inputs{remedy}, or free what else the device holds." in message
    assert state(model) == before
    monkeypatch.undo()
    assert attribute(model).error.max() < 1e-12


def test_the_definition_in_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, real = build("bert"), tiny_models.inputs("bert"), reference.decompose
    whole = ffattr.attribute(model, given, backend="reference")

    def decompose(weights: Any, x: Tensor, attention: Any, rows: Tensor, *others: Any) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(weights, x, attention, rows, *others)

    monkeypatch.setattr(reference, "decompose", decompose)
    found = ffattr.attribute(model, given, backend="reference")
    torch.testing.assert_close(found["layer"], whole["layer"], rtol=1e-12, atol=1e-12)
    assert {plan.halvings for plan in found.plan.layers} == {2}  # type: ignore[attr-defined]


def test_an_error_without_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels say only that a call failed: what the allocator counts tells what it was."""
    model, real = build("bert"), torch_kernels.ff_norms
    whole = attribute(model)
    refused, counts = 0, True

    def failing(alpha: Tensor, *others: Any) -> Tensor:
        nonlocal refused
        if alpha[0].numel() > 20:
            refused += counts
            raise RuntimeError("API call failed")
        return real(alpha, *others)

    monkeypatch.setattr(out_of_memory.OutOfMemoryWatch, "_count_refusals", lambda self: refused)
    monkeypatch.setattr(torch_kernels, "ff_norms", failing)
    found = attribute(model, method="direct")
    torch.testing.assert_close(found["layer"], whole["layer"], rtol=1e-12, atol=1e-12)
    assert {plan.halvings for plan in found.plan.layers} == {3}
    counts = False
    with pytest.raises(RuntimeError, match="API call failed"):
        attribute(model, method="direct")


def test_refusals_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"num_ooms": 3}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    watch, error = out_of_memory.OutOfMemoryWatch(torch.device("cuda", 0)), RuntimeError("API call failed")
    assert not watch.explains(error)
    assert watch.explains(torch.OutOfMemoryError("CUDA out of memory"))
    stats["num_ooms"] = 4
    assert watch.explains(error)
    assert not out_of_memory.OutOfMemoryWatch(torch.device("cpu")).explains(error)
