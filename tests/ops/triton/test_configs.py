"""Tile sizes: by rule for every GPU, from a file where they were measured. No GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

configs = pytest.importorskip("ffattr.ops.triton.configs")
Config, Shape = configs.Config, configs.Shape

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8]
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
SHAPE = Shape(12, 1, 768, 512, torch.bfloat16, (9, 0), "A GPU")
MEASURED = Config(64, 64, 16, 8, 4, False)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path))
    configs._read_tuned.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    configs._read_tuned.cache_clear()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_leave_registers_for_the_rest(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """A tile's sums take at most half of a thread's 255, and every size is one that Triton has."""
    for heads in (1, 12, 32, 64, 128):
        for streams, width, queries in ((1, 768, 512), (2, 4096, 16), (2, 300, 64)):
            shape = Shape(heads, streams, width, queries, dtype, capability, "A GPU")
            for config in (configs.choose_direct(shape), configs.choose_build(shape), configs.choose_apply(shape, 64)):
                assert config.queries * config.columns <= 128 * 32 * config.warps
                sizes = (config.queries, config.columns, config.neurons, config.warps)
                assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
                assert config.neurons >= 16  # a matrix instruction sums over as many
                assert not config.tma or capability >= (9, 0)


@pytest.mark.parametrize(("head_dim", "neurons"), [(8, 16), (16, 16), (20, 32), (48, 64), (64, 64), (256, 64)])
def test_a_step_stays_within_one_head(head_dim: int, neurons: int) -> None:
    assert configs.choose_apply(SHAPE, head_dim).neurons == neurons


@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (16, 16), (17, 32), (33, 64), (128, 128)])
def test_rows_of_a_tile_of_heads(heads: int, rows: int) -> None:
    assert configs.padded_heads(heads) == rows


def test_shapes_that_share_a_measurement() -> None:
    key = SHAPE.make_key("direct")
    assert key == "direct: bfloat16, 1 stream(s), 16 heads, many queries, wide"
    assert replace(SHAPE, heads=16, queries=65, width=1024).make_key("direct") == key
    for other in (
        replace(SHAPE, heads=17),
        replace(SHAPE, queries=64),
        replace(SHAPE, streams=2),
        replace(SHAPE, width=300),
        replace(SHAPE, dtype=torch.float16),
    ):
        assert other.make_key("direct") != key
    assert SHAPE.make_key("build") != key


@pytest.mark.parametrize(("width", "narrow"), [(256, False), (768, False), (700, False), (690, True), (300, True)])
def test_narrow_is_more_than_a_tenth_outside_the_matrix(width: int, narrow: bool) -> None:
    assert replace(SHAPE, width=width).is_narrow == narrow


def test_what_is_remembered_goes_before_the_rule(folder: Path) -> None:
    rule = configs.choose_direct(SHAPE)
    assert rule != MEASURED
    configs.remember_config(SHAPE, "direct", MEASURED)
    assert configs.choose_direct(replace(SHAPE, heads=5)) == MEASURED
    for other in (replace(SHAPE, device="Another GPU"), replace(SHAPE, heads=32)):
        assert configs.choose_direct(other) != MEASURED
    assert configs.choose_build(SHAPE) != MEASURED
    assert not list(folder.iterdir())
    configs.remember_config(SHAPE, "direct", None)
    assert configs.choose_direct(SHAPE) == rule


def test_what_is_saved_is_read_by_a_later_process(folder: Path) -> None:
    configs.remember_config(SHAPE, "build", MEASURED)
    file = configs.save_configs()
    assert file == configs.tuned_file() == folder / "triton.json"
    assert json.loads(file.read_text()) == {"A GPU": {SHAPE.make_key("build"): asdict(MEASURED)}}
    configs._read_tuned.cache_clear()
    assert configs.choose_build(SHAPE) == MEASURED


@pytest.mark.parametrize("text", ["{", "[]", '{"A GPU": 3}', '{"A GPU": {"direct": {"queries": 64}}}'])
def test_a_damaged_file_is_no_measurement(text: str) -> None:
    rule = configs.choose_direct(SHAPE)
    configs._read_tuned.cache_clear()
    configs.tuned_file().write_text(text)
    with pytest.warns(UserWarning, match=r"triton\.json is not what `ffattr bench --tune` writes .*: ignored; delete"):
        assert configs.choose_direct(SHAPE) == rule


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_are_different_and_fit(dtype: torch.dtype) -> None:
    before, after = (
        list(configs.list_candidates(replace(SHAPE, dtype=dtype, capability=capability)))
        for capability in ((8, 0), (9, 0))
    )
    assert len(set(after)) == len(after) == 2 * len(before) > 100
    assert not any(config.tma for config in before)
    assert all(16 <= config.queries * config.columns // (32 * config.warps) <= 128 for config in after)
    assert min(config.neurons for config in after) == (32 if dtype == FLOAT8 else 16)
