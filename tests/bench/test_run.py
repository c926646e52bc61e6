"""Random layers of known shapes, what refuses to be timed, times, and what `ffattr bench` prints."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ffattr import cli
from ffattr.bench import compare as comparing
from ffattr.bench import timing
from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.compare import Row, compare_backends
from ffattr.bench.run import compute_maps, materialise_maps, record_operands
from ffattr.bench.truth import TOLERANCE, Truth, WrongResult
from ffattr.cli import bench as bench_command
from ffattr.errors import OutOfMemory
from ffattr.machine import name_processor
from ffattr.ops import backends, torch_kernels

CPU = torch.device("cpu")
TINY = {name: replace(size, width=24, heads=3, ff_width=40) for name, size in SHAPES.items()}


class Off:
    """Plain PyTorch, but for a factor of the wide maps, or a NaN in a row that no sample meets."""

    def __init__(self, factor: float, row: int | None = None) -> None:
        self.factor, self.row = factor, row

    def __getattr__(self, name: str) -> Any:
        return getattr(torch_kernels, name)

    def ff_norms(self, *arguments: Any) -> torch.Tensor:
        out = torch_kernels.ff_norms(*arguments)
        out[:, slice(None) if self.row is None else self.row] *= self.factor
        return out


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, operators: Any) -> None:
    monkeypatch.setitem(backends.BACKENDS, name, replace(backends.BACKENDS["torch"], name=name, load=lambda: operators))


# ---- layers


@pytest.mark.parametrize(
    ("name", "scopes", "parameters"),
    [
        ("minilm", ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"), 12),
        ("gpt2", ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"), 12),
        ("llama-7b", ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"), 6),
    ],
)
def test_layers(name: str, scopes: tuple[str, ...], parameters: int) -> None:
    case = Case.draw_random(TINY[name], 5)
    assert case.weights.scopes == scopes
    assert (*case.narrow_scopes, *case.wide_scopes) == scopes[1:]
    tensors = dict(case.weights.tensors())
    assert len(tensors) == parameters + ("gate.weight" in tensors)
    assert ("gate.weight" in tensors) == (name == "llama-7b")
    half = Case.draw_random(TINY[name], 5, torch.bfloat16)
    for key, tensor in half.weights.tensors():
        assert torch.equal(tensor, tensors[key].bfloat16()) or key.startswith("norm")  # 1 + x is rounded twice
    assert {t.dtype for _, t in case.cast_to(torch.float64).weights.tensors()} == {torch.float64}
    assert case.cast_to(torch.float64).attention.query.dtype == case.cast_to(torch.float64).x.dtype == torch.float64


def test_sizes_are_those_of_the_models() -> None:
    assert {name: (s.width, s.heads, s.ff_width) for name, s in SHAPES.items()} == {
        "minilm": (384, 12, 1536),
        "bert-base": (768, 12, 3072),
        "gpt2": (768, 12, 3072),
        "llama-7b": (4096, 32, 11008),
    }


def test_shares_count_two_t_squared_f_d() -> None:
    full = Case.draw_random(TINY["bert-base"], 10)
    causal = Case.draw_random(replace(TINY["bert-base"], causal=True), 10)
    gated = Case.draw_random(replace(TINY["llama-7b"], causal=False), 10)
    assert full.flops == gated.flops == 2 * 10 * 10 * 40 * 24
    assert causal.flops == full.flops / 2


# ---- what may be timed


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


@pytest.mark.parametrize(
    ("operators", "said"), [(Off(1.001), "1.0e-03"), (Off(torch.nan, 1), "nan")], ids=["off", "nan"]
)
def test_a_wrong_result_is_refused(operators: Off, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torch", operators)
    case = Case.draw_random(TINY["minilm"], 7)
    truth, found = Truth.from_case(case, case.wide_scopes), compute_maps(case, "torch", "direct", case.wide_scopes)
    with pytest.raises(WrongResult, match=f"^mine is wrong by {said}, expected less than 2e-05: not timed"):
        truth.verify_maps("mine", found, 2e-5)


def test_operands_are_what_the_layer_hands_over() -> None:
    case = Case.draw_random(TINY["bert-base"], 6)
    for method in ("direct", "operator"):
        run = torch_kernels.ff_norms if method == "direct" else torch_kernels.operator_norms
        out = run(*record_operands(case, method, torch.float32))
        for tile, expected in zip(out, compute_maps(case, "torch", method, case.wide_scopes).values(), strict=True):
            assert torch.equal(tile, expected)


# ---- times


def test_timed_is_a_median_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(timing, "seconds_of", lambda run, device, repeats=1: calls.append(run()) or calls[-1])
    values = iter([5.0, 1.0, 3.0])
    assert timing.time_median(lambda: next(values), CPU, 3) == 3.0
    values = iter([7.0, 1.0])
    assert timing.time_median(lambda: next(values), CPU, 3, limit=0.0) == 7.0  # one round at least
    monkeypatch.undo()
    assert 0.01 <= timing.seconds_of(lambda: time.sleep(0.01), CPU, 2) < 1


def test_what_the_machine_reaches() -> None:
    assert timing.copy_bandwidth(CPU, rounds=1, size=1 << 16) > 1e6
    run, flops = timing.make_product(CPU, torch.float32)
    assert flops == 2 * 4096 * 3072 * 768
    assert run().shape == (4096, 768)
    assert name_processor(CPU)


def test_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(timing, "make_product", lambda device, dtype: (lambda: asked.append(dtype), 6.0))
    monkeypatch.setattr(timing, "time_median", lambda run, device, rounds: 2.0)
    assert timing.matrix_rate(CPU, torch.bfloat16) == (torch.float32, 3.0)
    assert timing.matrix_rate(torch.device("cuda"), torch.float8_e4m3fn) == (torch.bfloat16, 3.0)
    assert asked == [torch.float32, torch.bfloat16]  # run once before they are timed


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", Off(1.01))
    monkeypatch.setattr(comparing, "time_median", lambda run, device, rounds, limit: run() and 0.5)
    case = Case.draw_random(TINY["bert-base"], 6)
    rows = {row.backend: row for row in compare_backends(case, torch.float32, "auto", 1)}
    assert list(rows) == list(backends.BACKENDS)
    assert "cpu is wrong by" in rows["cpu"].reason
    assert "triton" in rows["triton"].reason.lower()  # not there, or only as an interpreter
    assert (rows["torch"].seconds, rows["torch"].method, rows["reference"].method) == (0.5, "direct", "reference")
    assert 0 < (rows["torch"].error or 0) < 1e-5

    real = comparing.prepare_run

    def full(case: Case, backend: Any, *rest: Any) -> Any:
        if backend == "torch":
            raise OutOfMemory("too long")
        return real(case, backend, *rest)

    monkeypatch.setattr(comparing, "prepare_run", full)
    assert list(compare_backends(case, torch.float32, "torch", 1)) == [Row("torch", reason="too long")]


# ---- the command line


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in TINY.items():
        monkeypatch.setitem(SHAPES, name, size)
    monkeypatch.setattr(bench_command, "matrix_rate", lambda device, dtype: (torch.float32, 1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


@pytest.mark.usefixtures("small")
def test_bench_prints_a_table_and_why_not() -> None:
    result = run("--shape", "gpt2", "--tokens", "5", "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert f"{name_processor(CPU)}: gpt2, 5 tokens, float32" in result.stdout
    assert "its own float32 matrix product: 0.001 TFLOP/s" in result.stdout
    assert "no triton: " in result.stdout
    for name in ("torch", "reference"):
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert "%" in line
        assert "e-0" in line


@pytest.mark.usefixtures("small")
def test_bench_of_one_backend_in_another_precision() -> None:
    for dtype in ("bfloat16", "float64"):
        result = run("--tokens", "4", "--backend", "torch", "--dtype", dtype, "--rounds", "1", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert dtype in result.stdout
        assert "reference" not in result.stdout


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shape", "gpt5"], 2, "--shape 'gpt5': expected one of minilm, bert-base, gpt2, llama-7b"),
        (["--device", "tpu"], 2, "--device 'tpu': expected auto, cpu or cuda"),
        (["--device", "cuda"], 2, "--device cuda: torch sees no CUDA device here"),
        (["--dtype", "int8"], 2, "--dtype int8: expected one of float64, float32, bfloat16, float16, float8_e4m3fn"),
        (["--dtype", "float31"], 2, "--dtype 'float31' is no torch dtype"),
        (["--backend", "cpu", "--dtype", "float16"], 1, "cpu"),
        (["--backend", "gpu"], 2, "unknown backend 'gpu'"),
        (["--minutes", "1"], 2, "--minutes goes with --tune"),
        (["--tune"], 1, "--tune times Triton kernels on a CUDA device, not on cpu"),
    ],
)
def test_bench_errors_are_one_line(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_only_the_command_line_needs_rich() -> None:
    blocked = ["rich", "typer", "transformers", "safetensors", "matplotlib", "pandas"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import ffattr.bench.cases, ffattr.bench.tune"
    subprocess.run([sys.executable, "-c", code], check=True)
