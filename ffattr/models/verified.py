"""The record of what ``benchmarks/paper/verify.py`` measured: how closely each family of models is reproduced, and each
model type that its structure tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..machine import replacing

__all__ = ["RECORD", "Layers", "Record", "Row", "Structure", "Trained", "Variant", "read", "rows"]

RECORD = Path(__file__).parent / "verified.json"

_INPUTS = ("text", "images", "sound", "features")
_NORMS = ("after", "before", "before and after each block", "of what a block returns", "none")


@dataclass(frozen=True)
class Layers:
    """What the layers of a model are like.

    ``norms``: where they are, seen from a block and its residual connection. ``latent``: values are made of a narrow
    vector, behind a norm. ``scopes`` are those of the layers' own
    tokens; where there are an encoder and a decoder, the decoder has the same for the encoder's.
    """

    inputs: str
    encoder_decoder: bool
    norms: str
    feed_forward: str
    parallel: bool
    scopes: tuple[str, ...]
    latent: bool = False

    def __str__(self) -> str:
        norms = "no norms" if self.norms == "none" else f"norms {self.norms}"
        words = [f"{norms}{', parallel' * self.parallel}", self.feed_forward]
        if self.latent:
            words.insert(0, "latent attention")
        if self.encoder_decoder:
            words.insert(0, "encoder and decoder")
        if self.inputs != "text":
            words.insert(0, self.inputs)
        return ", ".join(words)

    @property
    def order(self) -> tuple[int, bool, bool, bool, int, bool, str]:
        """Is the key that rows are sorted by."""
        mixture = "mixture" in self.feed_forward
        place = _INPUTS.index(self.inputs), _NORMS.index(self.norms)
        return place[0], self.encoder_decoder, self.latent, mixture, place[1], self.parallel, self.feed_forward


@dataclass(frozen=True)
class Variant:
    """A small random model in float64.

    ``error`` is the largest relative difference of a token's output in any layer, ``tolerance`` what rounding explains;
    ``maps`` the largest difference from the definition of any entry of the maps of ``backend``, relative to the largest
    entry of its map.
    """

    name: str
    model_type: str
    layers: Layers
    error: float
    tolerance: float
    maps: float
    backend: str


@dataclass(frozen=True)
class Trained:
    """A trained model in float32, with ``count`` layers."""

    name: str
    model_type: str
    layers: Layers
    count: int
    error: float
    tolerance: float


@dataclass(frozen=True)
class Structure:
    """A small random model in float64 of a type that no family describes, found by its structure: ``layers`` of it,
    with errors as those of a `Variant`."""

    model_type: str
    layers: int
    error: float
    maps: float


@dataclass(frozen=True)
class Record:
    versions: Mapping[str, str]
    variants: tuple[Variant, ...]
    trained: tuple[Trained, ...]
    structures: tuple[Structure, ...] = ()

    def write(self, path: Path = RECORD) -> None:
        """Writes one line for each model, so that a change of one is a change of its line."""
        parts = [f'"versions": {json.dumps(dict(self.versions))}']
        found: dict[str, Sequence[Variant | Trained | Structure]] = {"variants": self.variants, "trained": self.trained}
        found["structures"] = self.structures
        for name, models in found.items():
            lines = ",\n".join(f"  {json.dumps(asdict(model))}" for model in models)
            parts.append(f'"{name}": [\n{lines}\n ]')
        with replacing(path) as temporary:
            temporary.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """Models whose layers are alike, and the largest numbers of all of them."""

    model_types: tuple[str, ...]
    layers: Layers
    error: float
    maps: float
    trained: tuple[Trained, ...]


def read(path: Path = RECORD) -> Record:
    content = json.loads(path.read_text(encoding="utf-8"))
    variants = (Variant(**{**values, "layers": _parse_layers(values["layers"])}) for values in content["variants"])
    trained = (Trained(**{**values, "layers": _parse_layers(values["layers"])}) for values in content["trained"])
    structures = (Structure(**values) for values in content["structures"])
    return Record(content["versions"], tuple(variants), tuple(trained), tuple(structures))


def _parse_layers(values: dict[str, Any]) -> Layers:
    return Layers(**{**values, "scopes": tuple(values["scopes"])})


def rows(record: Record) -> list[Row]:
    """Makes a row of all variants that share a description, sorted."""
    found: dict[Layers, list[Variant]] = {}
    for variant in record.variants:
        found.setdefault(variant.layers, []).append(variant)
    return [
        Row(
            _label_rows(found[layers], record.variants),
            layers,
            max(variant.error for variant in found[layers]),
            max(variant.maps for variant in found[layers]),
            tuple(trained for trained in record.trained if trained.layers == layers),
        )
        for layers in sorted(found, key=lambda layers: layers.order)
    ]


def _label_rows(alike: Sequence[Variant], everything: Sequence[Variant]) -> tuple[str, ...]:
    """Names the model types, with the variants meant where the others are in another row."""
    of_type: dict[str, list[str]] = {}
    for variant in alike:
        of_type.setdefault(variant.model_type, []).append(variant.name)
    labels = []
    for model_type, names in sorted(of_type.items()):
        elsewhere = sum(variant.model_type == model_type for variant in everything) > len(names)
        stem = model_type.replace("_", "-")
        named = elsewhere and all(name.startswith(f"{stem}-") for name in names)
        apart = ", ".join(name.removeprefix(f"{stem}-") for name in names)
        labels.append(f"{model_type} ({apart})" if named else model_type)
    return tuple(labels)
