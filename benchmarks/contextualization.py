"""What each component of the feed-forward blocks of trained models changes in the maps, as Markdown tables.

Per layer, ``1 - Spearman rho`` of the maps before and after FF, the residual (RES), the norm (LN) and the whole block,
on 128 tokens of English prose, exact and in float64 behind a float32 forward pass: numbers of the model and the
text, whatever computed them. ``python benchmarks/contextualization.py [MODEL ...]``; for Gemma,
``make test-models`` has to have run.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
import torch
from models import Loaded, gemma3, minilm, smollm2
from texts import running

import ffattr
from ffattr.analysis import contextualization_change

MODELS = {"MiniLM-L6": minilm, "SmolLM2-135M-Instruct": smollm2, "Gemma 3 270M": gemma3}
TOKENS = 128
COMPONENTS = ["FF", "RES", "LN", "FF block"]


def prose(loaded: Loaded, tokens: int = TOKENS) -> dict[str, Any]:
    """The first ``tokens`` tokens of real text, those that the model's tokenizer adds included."""
    inputs = loaded.tokenizer(running(), return_tensors="pt", truncation=True, max_length=tokens)
    if inputs["input_ids"].shape[1] < tokens:
        raise ValueError(f"the text has {inputs['input_ids'].shape[1]} tokens, expected at least {tokens}")
    return dict(inputs)


def changes(loaded: Loaded, inputs: dict[str, Any]) -> pd.DataFrame:
    """``1 - rho``, a row per layer, a column per component: all layers, or of a deep model the ends and the middle."""
    count = loaded.model.config.num_hidden_layers
    layers = range(count) if count <= 12 else sorted({0, 1, count // 6, count // 2, count - 2, count - 1})
    attribution = ffattr.attribute(loaded.model, inputs, scopes="all", layers=list(layers), dtype=torch.float64)
    table = contextualization_change(attribution).pivot_table(index="layer", columns="component", values="value")
    return table[COMPONENTS]


def main() -> None:
    torch.set_grad_enabled(False)
    wanted = sys.argv[1:] or list(MODELS)
    unknown = [name for name in wanted if name not in MODELS]
    if unknown:
        raise SystemExit(f"no model {unknown[0]!r}, expected some of: {', '.join(map(repr, MODELS))}")
    for name in wanted:
        loaded = MODELS[name]()
        table = changes(loaded, prose(loaded))
        print(f"\n{name}, 1 - Spearman rho on {TOKENS} tokens\n")
        print(f"| layer | {' | '.join(COMPONENTS)} |")
        print("| ---: |" + " ---: |" * len(COMPONENTS))
        for layer, row in table.iterrows():
            print(f"| {layer} | {' | '.join(f'{value:.3f}' for value in row)} |")


if __name__ == "__main__":
    main()
