"""What the choices that an analysis leaves open do to its figures, and what means over layers hide: on trained models.

    python benchmarks/paper/choices.py MODEL [--texts 40] [--counted N] [--layers 0:10]

MODEL is minilm, smollm2, gemma3, or a name in the local Hugging Face cache; of a deep one some layers at a time may be
computed. Three tables, kept for each model in
``benchmarks/results/paper/choices.json`` and written together as ``choices.md``:

how much the feed-forward network changes the map (`contextualization_change` of FF, the mean over layers, of the first
    ``--texts`` sentences), by which pairs count, what is ranked, and where Integrated Gradients begin;
how many of the 50 most amplified pairs of each layer are pieces of one word, neighbours, or have a special token, of
    all ``--counted`` sentences;
the angle between the network's vector and what bypasses it, layer by layer, of the same sentences.

Exact and in float32; a machine changes no digit that is shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reproduce_paper import NAMES, load
from texts import CORPUS

import ffattr
from ffattr.analysis import Alignment, AmplifiedPairs, Several, contextualization_change
from ffattr.selection import parse_indices

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"
CHOICES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "structural zeros of a causal model counted": {"zeros": True},
    "no pairs with special tokens": {"special": False},
    "no pairs of a token and itself": {"own": False},
    "shares of rows ranked instead of norms": {"shares": True},
}
KINDS = ("subwords", "adjacent", "special_or_punctuation")


def measure_choices(model: Any, texts: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the change through the feed-forward network by choice and layer."""
    found = {}
    for baseline in ("zero", "bias"):
        maps = ffattr.attribute(model, list(texts), baseline=baseline, **options)
        for name, choice in CHOICES.items() if baseline == "zero" else [("gradients begin at the bias", {})]:
            frame = contextualization_change(maps, **choice).query("component == 'FF'")
            found[name] = {str(layer): value for layer, value in zip(frame["layer"], frame["value"], strict=True)}
    return found


def measure_layers(model: Any, texts: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns for each layer the counts of amplified pairs by kind, and the angles of pairs of different tokens."""
    pairs, angles = AmplifiedPairs(50), Alignment()
    kept = ffattr.Reduce(Several(pairs, angles))
    attr = ffattr.attribute(model, list(texts), keep=kept, **options)
    counts = pairs.frame(attr).groupby("layer")[list(KINDS)].sum()
    others = angles.frame().query("pairs_of == 'others'").set_index("layer")
    columns = ["median", "negative", "ratio", "removed"]
    return {
        str(layer): {kind: int(counts[kind][layer]) for kind in KINDS}
        | {name: round(float(others[name][layer]), 4) for name in columns}
        for layer in attr.layers
    }


def write_tables(kept: dict[str, Any]) -> str:
    """Returns all models' tables as Markdown."""
    lines = ["# What choices do, and what means over layers hide", "", "By `benchmarks/paper/choices.py`.", ""]
    names = list(dict.fromkeys(name for one in kept.values() for name in one["choices"]))
    lines += ["## `1 - rho` through the feed-forward network, means over the layers below", ""]
    lines += [f"| | {' | '.join(kept)} |", f"| --- |{' ---: |' * len(kept)}"]
    for name in names:
        of_layers = [one["choices"][name].values() for one in kept.values()]
        values = [f"{sum(one) / len(one):.4f}" for one in of_layers]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += ["", f"Of the first {', '.join(str(one['texts']) for one in kept.values())} sentences.", ""]
    for model, one in kept.items():
        lines += [f"## {model}, layer by layer, {one['counted']} sentences", ""]
        lines.append(
            "| layer | pieces of one word, of 50 amplified pairs | neighbouring words | special or punctuation | "
        )
        lines[-1] += "cosine of network and bypass, median | below zero | length over the bypass | taken away |"
        lines.append("| ---: |" + " ---: |" * 7)
        for layer, row in sorted(one["layers"].items(), key=lambda item: int(item[0])):
            cells = [layer, *(row[kind] for kind in KINDS), f"{row['median']:.3f}", f"{row['negative']:.0%}"]
            cells += [f"{row['ratio']:.3f}", f"{row['removed']:.3f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=40, help="sentences for the table of choices")
    parser.add_argument("--counted", type=int, default=len(CORPUS), help="sentences for the tables of layers")
    parser.add_argument("--layers", default=":", help="those to compute now; others stay as they are kept")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load(asked.model)
    names = ffattr.attribute(model, "A b.", tokenizer=tokenizer, scopes="all", layers=0).scopes
    scopes = [name for name in names if name.startswith("atb")]
    options = {"tokenizer": tokenizer, "scopes": scopes, "layers": parse_indices(asked.layers)}
    choices = measure_choices(model, CORPUS[: asked.texts], options)
    layers = measure_layers(model, CORPUS[: asked.counted], options)
    file = RESULTS / "choices.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    called = NAMES.get(asked.model, asked.model.rpartition("/")[2])
    before = kept.get(called, {"choices": {}, "layers": {}})
    choices = {name: before["choices"].get(name, {}) | values for name, values in choices.items()}
    layers = before["layers"] | layers
    kept[called] = {"texts": asked.texts, "counted": asked.counted, "choices": choices, "layers": layers}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "choices.md").write_text(write_tables(kept))
    print(write_tables({called: kept[called]}))


if __name__ == "__main__":
    main()
