"""How closely every family of models is reproduced: writes ffattr/models/verified.json and the table in docs/models.md.

    python benchmarks/paper/verify.py [--variants | --markdown | --sweep [model_type ...]]

The small random models of the tests, every variant, in float64: layers recomputed from their descriptions against the
model's own, maps of all scopes against the definition. Then trained models in float32, those that are installed
(``make test-models`` does that). A model that is not within its tolerance ends the script, and nothing is written.
``--variants`` leaves the record of trained models as it is. ``--markdown`` measures nothing: it writes the table
from the record that there is. ``--sweep`` tries every model type of transformers instead, see `sweep`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sweep
import torch
from torch import nn

import ffattr
from ffattr.models.registry import resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.models.verified import Layers, Record, Structure, Trained, Variant, read, rows
from ffattr.ops import backends
from ffattr.pipeline.reproduce import Reproduction, reproduce

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- by benchmarks/paper/verify.py -->\n", "<!-- end -->\n"
MAPS = 1e-10  # of float64
TITLES = {
    "minilm": "MiniLM-L6",
    "smollm2": "SmolLM2-135M",
    "gemma3": "Gemma 3 270M",
    "antiberty": "AntiBERTy",
    "dinov2": "DINOv2-small",
    "whisper": "Whisper tiny.en",
}
_KINDS = {
    "input_ids": "text",
    "pixel_values": "images",
    "input_values": "sound",
    "input_features": "sound",
    "src": "features",
}


def _module(folder: str, name: str) -> Any:
    """A helper of the tests, which are no package."""
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module(name)


def described(model: nn.Module) -> Layers:
    """By the description that the adapter makes of the model."""
    description = resolve(model)
    spec = description.layers[-1]
    scopes = spec.own_scopes if spec.experts is None else (*spec.own_scopes, spec.expert_scope)
    return Layers(
        inputs=_KINDS[str(getattr(model, "main_input_name", "src"))],
        encoder_decoder=bool(description.stacks),
        norms=_norms(spec),
        feed_forward=_feed_forward(spec),
        parallel=spec.parallel,
        scopes=tuple(scope.name for scope in scopes),
        latent=spec.latent is not None,
    )


def _feed_forward(spec: LayerSpec) -> str:
    if spec.experts is not None:
        return "mixture of experts" if spec.shared is None else "mixture of experts and a shared one"
    return "dense" if spec.gate is None else "gated"


def _norms(spec: LayerSpec) -> str:
    if spec.norm_of_ff is not None:
        return "of what a block returns" if spec.norm_before_ff is None else "before and after each block"
    return "after" if spec.norm_after_ff is not None else "none" if spec.norm_before_ff is None else "before"


def variant(name: str) -> Variant:
    """A small random model of the tests by its name there, with padding where the family knows any."""
    tiny = _module("tests/helpers", "tiny_models")
    model = tiny.build(name)
    layers = described(model)
    given = tiny.inputs(name, padding="right" if "right" in tiny.paddings(name) else None)
    found = reproduce(model, given)
    tolerance = _reproduced(name, found)
    scopes = ["all", *(scope for scope in layers.scopes if scope.endswith("_experts"))]
    options: dict[str, Any] = {"scopes": scopes, "dtype": torch.float64}
    expected = ffattr.attribute(model, given, backend="reference", **options)
    backend = backends.select_backend("auto", torch.device("cpu"), torch.float64, 1).name
    maps = ffattr.attribute(model, given, backend=backend, **options).maps
    difference = max(
        float((maps[scope] - tile).abs().max() / tile.abs().max().clamp_min(torch.finfo(tile.dtype).tiny))
        for scope, tile in expected.maps.items()
    )
    _require(name, "an entry of a map", difference, MAPS)
    return Variant(name, found.family, layers, found.error, tolerance, difference, backend)


def trained() -> Iterator[Trained]:
    """The models of `models` that are installed, on the inputs of tests/trained."""
    samples = _module("tests/trained", "samples")
    for name in (*samples.MODELS, *samples.MORE_MODELS):
        try:
            model = samples.load(name).model
        except ModuleNotFoundError as missing:
            print(f"{name}: not verified: {missing}", file=sys.stderr)
            continue
        found = reproduce(model, samples.inputs(name))
        tolerance = _reproduced(name, found)
        title, count = TITLES.get(name, name), len(found.layers)
        yield Trained(title, found.family, described(model), count, found.error, tolerance)


def _reproduced(name: str, found: Reproduction) -> float:
    """The largest tolerance of the layers, each of which is within its own."""
    for layer in found.layers:
        _require(name, f"the output of {f'{layer.stack} layer'.strip()} {layer.layer}", layer.error, layer.tolerance)
    return max(layer.tolerance for layer in found.layers)


def _require(name: str, what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise SystemExit(f"{name}: {what} is off by {error:.1e} (relative), expected at most {tolerance:.0e}")


def measure(kept: tuple[Trained, ...] | None) -> Record:
    """``kept``: the record of trained models, None to measure them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors are slower on several
    variants = []
    for name in _module("tests/helpers", "tiny_configs").MODELS:
        variants.append(variant(name))
        print(f"{name}: layers {variants[-1].error:.0e}, maps {variants[-1].maps:.0e}")
    torch.set_num_threads(threads)
    models = list(kept or ())
    for model in trained() if kept is None else ():
        models.append(model)
        print(f"{model.name}: {model.count} layers {model.error:.0e}")
    versions = {package: version(package) for package in ("ffattr", "torch", "transformers")}
    return Record(versions, tuple(variants), tuple(models), read().structures)


def keep_structures(found: list[sweep.Swept], record: Record) -> Record:
    """The record with what a sweep has mapped by structure alone."""
    mapped = [row for row in found if row.by == "structure"]
    structures = tuple(Structure(row.model_type, row.layers, row.error, row.maps) for row in mapped)
    return replace(record, structures=structures)


def markdown(record: Record) -> str:
    """The table: a row for all models whose layers are alike."""
    lines = [
        "| model types | layers | scopes | layer error | map error | trained weights, layer error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    above = ""
    for row in rows(record):
        scopes = " ".join(f"`{scope}`" for scope in row.layers.scopes[2:])
        models = ", ".join(f"{model.name} {model.error:.0e}" for model in row.trained)
        cells = [", ".join(row.model_types), str(row.layers), '"' if scopes == above else scopes]
        lines.append(f"| {' | '.join([*cells, f'{row.error:.0e}', f'{row.maps:.0e}', models])} |")
        above = scopes
    measured = ", ".join(f"{package} {number}" for package, number in record.versions.items() if package != "ffattr")
    return "\n".join([*lines, "", f"Measured by `benchmarks/paper/verify.py` with {measured}.", ""])


def write_page(record: Record) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + markdown(record) + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--markdown", action="store_true", help="write the table from the record that there is")
    parser.add_argument("--variants", action="store_true", help="leave the record of trained models as it is")
    parser.add_argument("--sweep", nargs="*", metavar="TYPE", help="try every model type of transformers, or these")
    asked = parser.parse_args()
    if asked.sweep is not None:
        found = sweep.sweep(asked.sweep)
        if not asked.sweep:
            sweep.write(found)
            keep_structures(found, read()).write()
        print(sweep.summarise(found))
        return
    if not asked.markdown:
        measure(read().trained if asked.variants else None).write()
    write_page(read())


if __name__ == "__main__":
    main()
