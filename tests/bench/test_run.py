"""The maps of a layer by every way that there is, and the operands of its operators."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bench_cases import TINY

from ffattr.bench.cases import Case
from ffattr.bench.run import compute_maps, materialise_maps, record_operands
from ffattr.bench.truth import TOLERANCE, Truth
from ffattr.ops import torch_kernels


@pytest.mark.parametrize("name", TINY)
def test_every_way_agrees_with_the_definition(name: str) -> None:
    case = Case.draw_random(TINY[name], 7)
    truth = Truth.from_case(case, (*case.narrow_scopes, *case.wide_scopes))
    assert truth.rows.tolist() == [0, 2, 3, 6]
    assert {t.dtype for t in truth.maps.values()} == {torch.float64}
    every = truth.select_scopes(case.wide_scopes)
    for backend, method in (("torch", "direct"), ("torch", "operator"), ("reference", "auto")):
        assert every.verify_maps(backend, compute_maps(case, backend, method, case.wide_scopes), 1e-5) < 1e-5
    assert every.verify_maps("materialised", materialise_maps(case, case.wide_scopes), 1e-5) < 1e-5
    narrow = truth.select_scopes(case.narrow_scopes)
    assert narrow.verify_maps("torch", compute_maps(case, "torch", "direct", case.narrow_scopes), 1e-5) < 1e-5
    half = compute_maps(case, "torch", "direct", case.wide_scopes, None, torch.bfloat16)
    assert every.verify_maps("half", half, TOLERANCE[torch.bfloat16]) > 1e-5


def test_operands_are_what_the_layer_hands_over() -> None:
    case = Case.draw_random(TINY["bert-base"], 6)
    for method in ("direct", "operator"):
        run = torch_kernels.ff_norms if method == "direct" else torch_kernels.operator_norms
        out = run(*record_operands(case, method, torch.float32))
        for tile, expected in zip(out, compute_maps(case, "torch", method, case.wide_scopes).values(), strict=True):
            assert torch.equal(tile, expected)


def test_only_the_command_line_needs_rich() -> None:
    blocked = ["rich", "typer", "transformers", "safetensors", "matplotlib", "pandas"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import ffattr.bench.cases, ffattr.bench.tune"
    subprocess.run([sys.executable, "-c", code], check=True)
