"""Every model type of the installed transformers, built small: mapped, refused with its reason, or crashed.

    python benchmarks/paper/verify.py --sweep [model_type ...]

All take a quarter of an hour, and write ``benchmarks/results/paper/sweep.json`` and ``sweep.md``; what becomes of types
that are named is printed alone. Each type runs in a process of its own, for five minutes at the most. A model is mapped
where all its layers are reproduced and its maps are those of the definition.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from small_models import NotBuilt, build_model, make_inputs

import ffattr
from ffattr.errors import FfattrError
from ffattr.models.registry import resolve

__all__ = ["Swept", "read", "summarise", "sweep", "sweep_type", "tabulate", "write"]

TESTS = str(Path(__file__).resolve().parents[2] / "tests" / "helpers")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"
SECONDS = 300
MAPS = 1e-10

Outcome = Literal["mapped", "refused", "crashed", "not built"]
OUTCOMES: tuple[Outcome, ...] = ("mapped", "refused", "crashed", "not built")


@dataclass(frozen=True)
class Swept:
    """What became of a model type: ``by`` "family" or "structure", ``reason`` why it is not mapped."""

    model_type: str
    outcome: Outcome
    by: str = ""
    layers: int = 0
    error: float = 0.0
    maps: float = 0.0
    reason: str = ""


def sweep(model_types: Sequence[str]) -> list[Swept]:
    import transformers

    known, mapping = transformers.CONFIG_MAPPING, transformers.MODEL_MAPPING
    types = list(known)
    wanted = model_types or sorted(one for one in types if known[one] in mapping)
    torch.set_num_threads(1)  # of which a fork leaves none behind
    sweep_type("bert")  # imports what all of them need, once
    context = multiprocessing.get_context("fork")
    found = []
    for model_type in wanted:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(model_type, theirs))
        process.start()
        theirs.close()
        row = Swept(model_type, "crashed", reason=f"took more than {SECONDS} seconds")
        try:
            if ours.poll(SECONDS):
                row = ours.recv()
        except EOFError:
            row = Swept(model_type, "crashed", reason="the process ended")
        process.kill()
        process.join()
        found.append(row)
        print(f"{row.model_type}: {row.outcome} {row.by} {row.reason[:150]}", flush=True)
    return found


def _run(model_type: str, to: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    warnings.simplefilter("ignore")
    to.send(sweep_type(model_type))


def sweep_type(model_type: str) -> Swept:
    """What becomes of one model type, in this process."""
    try:
        model = build_model(model_type)
        given = _find_inputs(model)
    except NotBuilt as reason:
        of_tests = _build_as_tests_do(model_type)
        if of_tests is None:
            return Swept(model_type, "not built", reason=str(reason))
        model, given = of_tests
    try:
        found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=torch.float64)
        expected = ffattr.attribute(model, given, scopes="all", backend="reference", dtype=torch.float64)
    except FfattrError as refused:
        return Swept(model_type, "refused", reason=_shorten(refused))
    except Exception as error:
        return Swept(model_type, "crashed", reason=f"{type(error).__name__}: {_shorten(error)}")
    stacks = list(found.stacks.values()) if hasattr(found, "stacks") else [found]
    others = list(expected.stacks.values()) if hasattr(expected, "stacks") else [expected]
    maps = max(
        float((one.maps[scope] - tile).abs().max() / tile.abs().max().clamp_min(1e-300))
        for one, other in zip(stacks, others, strict=True)
        for scope, tile in other.maps.items()
    )
    if not maps <= MAPS:
        return Swept(model_type, "crashed", reason=f"maps are {maps:.0e} off the definition")
    family = resolve(model).family
    by = "structure" if family.startswith("structure of") else "family"
    worst = max(float(stack.error.max()) for stack in stacks)
    return Swept(model_type, "mapped", by, sum(len(stack.layers) for stack in stacks), worst, maps)


def _build_as_tests_do(model_type: str) -> tuple[Any, dict[str, torch.Tensor]] | None:
    """A small model of the tests and its inputs, where they have one of the type."""
    import transformers

    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    tiny: Any = importlib.import_module("tiny_models")
    for name in tiny.EVERY_FAMILY:
        config = getattr(transformers, f"{tiny.MODELS[name][0]}Config")
        if config.model_type == model_type:
            return tiny.build(name), tiny.inputs(name)
    return None


def _find_inputs(model: Any) -> dict[str, torch.Tensor]:
    """The first inputs that the model runs on, without the package."""
    failures = []
    for given in make_inputs(model):
        try:
            with torch.no_grad():
                model(**given)
        except Exception as error:
            failures.append(f"{', '.join(given)}: {type(error).__name__} {_shorten(error)[:100]}")
        else:
            return given
    raise NotBuilt(f"it did not run on {'; '.join(failures[:3])}")


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n")[0].split())


def write(rows: Sequence[Swept], folder: Path = RESULTS) -> None:
    """Writes the record, a line for each type, and the table of it."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    (folder / "sweep.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / "sweep.md").write_text(tabulate(rows), encoding="utf-8")


def read(folder: Path = RESULTS) -> list[Swept]:
    return [Swept(**row) for row in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))]


def tabulate(rows: Sequence[Swept]) -> str:
    """Returns all types by what became of them, those that are not mapped with the reason."""
    parts = [f"# Model types of transformers\n\n{summarise(rows)}"]
    mapped = [row for row in rows if row.outcome == "mapped"]
    for by, title in (("family", "Mapped by the description of their family"), ("structure", "Mapped by structure")):
        lines = [f"{row.model_type} ({row.error:.0e})" for row in mapped if row.by == by]
        parts.append(f"## {title}\n\nWith the largest relative error of a layer's output: {', '.join(lines)}.\n")
    for outcome in ("refused", "crashed", "not built"):
        some = [row for row in rows if row.outcome == outcome]
        if some:
            lines = [f"| {row.model_type} | {_first_sentences(row.reason)} |" for row in some]
            parts.append(
                "\n".join([f"## {outcome.capitalize()}", "", "| type | reason |", "| --- | --- |", *lines, ""])
            )
    return "\n".join(parts)


def summarise(rows: Sequence[Swept]) -> str:
    """Returns the totals, in a sentence."""
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in OUTCOMES}
    by_structure = sum(row.by == "structure" for row in rows)
    built = len(rows) - counts["not built"]
    return (
        f"Of the {len(rows)} model types that transformers {version('transformers')} makes a model of, {built} were "
        f"built small and run: {counts['mapped']} are mapped, {by_structure} of these by their structure alone, "
        f"{counts['refused']} are refused with a reason, {counts['crashed']} crash.\n"
    )


def _first_sentences(reason: str) -> str:
    """Returns a reason without what every refusal ends in, for a cell of a table."""
    for start in ("and its structure was not found: ",):
        reason = reason.split(start)[-1]
    return reason.split(" Describe its layers")[0].replace("|", "\\|")[:300]
