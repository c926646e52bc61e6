"""The search for the fastest tiles, with times that are made up: no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import CASE, Pretended, configs, triton_ops

from ffattr.bench import tune
from ffattr.bench.tune import Trial, near_first, search_configs
from ffattr.ops import torch_kernels

Config, Shape = configs.Config, configs.Shape

RULE = Config(128, 256, 64, 8, 3, True)


def times(table: dict[int, float]) -> Callable[[int, int], float]:
    """Configs are numbers here; what has no time does not run."""

    def attempt(config: int, rounds: int) -> float:
        calls.append((config, rounds))
        if config not in table:
            raise RuntimeError(f"no\nroom for {config}")
        return table[config] - rounds / 1000

    calls: list[tuple[int, int]] = []
    attempt.calls = calls  # type: ignore[attr-defined]
    return attempt


def test_search_tries_the_rule_first_and_the_best_again() -> None:
    attempt = times({number: 1.0 + number % 7 / 10 for number in range(8)})
    seen: list[Any] = []
    trials, left = search_configs([0, 3, 4, 9, 5, 6, 7, 1, 2], 3, attempt, progress=lambda *state: seen.append(state))
    assert left == 0
    calls = attempt.calls  # type: ignore[attr-defined]
    assert [config for config, _ in calls[:9]] == [3, 0, 4, 9, 5, 6, 7, 1, 2]
    assert {config for config, _ in calls[9:]} == {0, 7, 1, 2, 3}
    assert [trial.config for trial in trials] == [0, 7, 1, 2, 3, 4, 5, 6, 9]
    assert [trial.config for trial in trials if trial.rule] == [3]
    assert trials[-1] == Trial(9, None, "RuntimeError: no room for 9")
    assert seen[0][:2] == (1, 9)
    assert seen[-1] == (9, 9, pytest.approx(0.997))


def test_search_ends_in_time_but_always_tries_the_rule() -> None:
    trials, left = search_configs([1, 2], 0, times({0: 1.0, 1: 1.0, 2: 1.0}), deadline=0.0)
    assert ([trial.config for trial in trials], left) == ([0], 2)


def test_what_fails_when_tried_again_comes_last() -> None:
    def attempt(config: int, rounds: int) -> float:
        if config == 1 and rounds > 5:
            raise RuntimeError("off")
        return float(config)

    trials, _ = search_configs([2], 1, attempt)
    assert [(trial.config, trial.seconds) for trial in trials] == [(2, 2.0), (1, None)]


def test_near_first() -> None:
    farther = [replace(RULE, stages=2), replace(RULE, warps=4, queries=64), replace(RULE, neurons=16, tma=False)]
    assert near_first([*reversed(farther), RULE], RULE) == [RULE, *farther]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pretended]:
    yield Pretended(monkeypatch, tmp_path)
    monkeypatch.undo()
    configs._read_tuned.cache_clear()


SHAPE = Shape(3, 1, 24, 3, torch.bfloat16, (9, 0), "A GPU")


@pytest.mark.usefixtures("gpu")
def test_the_best_of_every_kernel_is_remembered_and_saved(gpu: Pretended) -> None:
    best = Config(64, 64, 16, 8, 4, False)
    gpu.seconds = lambda config: 0.5 if config == best else 1.0
    seen: list[str] = []
    found = tune.tune_kernels(CASE, torch.bfloat16, progress=lambda kernel, *state: seen.append(kernel))
    assert [tuned.kernel for tuned in found] == list(dict.fromkeys(seen)) == ["direct", "build", "apply"]
    for tuned in found:
        assert tuned.best is not None
        assert (tuned.best.config, tuned.best.seconds, tuned.left) == (best, 0.5, 0)
        assert sum(trial.rule for trial in tuned.trials) == 1
    # Heads of 8: deeper steps of `apply` would be cut to 16.
    assert {trial.config.neurons for trial in found[2].trials} == {16}
    assert len(found[0].trials) > len(found[2].trials)
    assert not configs.tuned_file().exists()
    file = configs.save_configs()
    configs._read_tuned.cache_clear()
    assert configs.choose_direct(SHAPE) == configs.choose_build(SHAPE) == configs.choose_apply(SHAPE, 8) == best
    assert set(json.loads(file.read_text())["A GPU"]) == {tuned.key for tuned in found}


@pytest.mark.usefixtures("gpu")
def test_float8_has_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = tune.tune_kernels(CASE, torch.float8_e4m3fn, seconds=0.0)
    assert (found.kernel, len(found.trials)) == ("direct", 1)
    assert found.left > 50


def test_wrong_configs_are_not_timed(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> torch.Tensor:
        out = torch_kernels.ff_norms(*arguments)
        return out * 1.1 if gpu.used is not None and gpu.used.stages == 3 else out

    monkeypatch.setattr(triton_ops, "ff_norms", wrong)
    found = tune.tune_kernels(CASE, torch.bfloat16, seconds=30)[0]
    bad = [trial for trial in found.trials if trial.seconds is None]
    assert {trial.config.stages for trial in bad} == {3}
    assert "WrongResult: off plain PyTorch by 1.0e-01" in bad[0].reason
    assert found.best is not None
    assert found.best.config.stages != 3


def test_nothing_that_runs_leaves_the_rule(gpu: Pretended) -> None:
    def none(config: Any) -> float:
        raise RuntimeError("out of resources")

    gpu.seconds = none
    rule = configs.choose_direct(SHAPE)
    found = tune.tune_kernels(CASE, torch.float8_e4m3fn)[0]
    assert found.best is None
    assert configs.choose_direct(SHAPE) == rule


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_leaves_everything_as_it_was(before: bool, gpu: Pretended) -> None:
    own = replace(configs.choose_direct(SHAPE), stages=2)
    if before:
        configs.remember_config(SHAPE, "direct", own)
        configs.save_configs()
    rule = configs.choose_direct(SHAPE)
    count = 0

    def interrupted(config: Any) -> float:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return 1.0 / count

    gpu.seconds = interrupted
    with pytest.raises(KeyboardInterrupt):
        tune.tune_kernels(CASE, torch.bfloat16)
    assert configs.choose_direct(SHAPE) == rule == (own if before else rule)
    assert configs._read_tuned() == {"A GPU": {SHAPE.make_key("direct"): own} if before else {}}
    assert configs.tuned_file().exists() == before
    configs._read_tuned.cache_clear()
    assert configs.choose_direct(SHAPE) == rule


def test_a_damaged_file_is_ignored_and_replaced(gpu: Pretended) -> None:
    configs.tuned_file().write_text('{"A GPU": {"direct": 3}}')
    with pytest.warns(UserWarning, match="is not what `ffattr bench --tune` writes"):
        tune.tune_kernels(CASE, torch.bfloat16, seconds=0.0)
    configs.save_configs()
    configs._read_tuned.cache_clear()
    assert len(json.loads(configs.tuned_file().read_text())["A GPU"]) == 3
    assert configs.choose_direct(SHAPE)
