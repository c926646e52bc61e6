"""Which scores of tokens are faithful to a model: contributions beside other methods, in a table that also shows where
they lose.

    python benchmarks/paper/faithfulness.py [--sentences 200] [--tokens 24] [--remove mask] [--write]

MiniLM-L6 with a head that is trained here (which of two books is a sentence from), and SmolLM2 (its own first choice of
the next token), on sentences of two books, cut to so many tokens. For each method the mean area over the perturbation
curve (`ffattr.evaluate`): how far the probability of the model's choice falls without the best tokens
(comprehensiveness, more is better), and with these alone (sufficiency, less is better). Then ten completions whose
cause is known (prompts.py): how often it is among the first three. Integrated Gradients are captum's, on embeddings.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum
import torch
from captum.attr import LayerIntegratedGradients

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu"))
from kept_figures import CPU, write_figures
from models import minilm, smollm2
from prompts import PROMPTS
from rich.console import Console
from rich.table import Table
from texts import CORPUS, SENTENCES
from torch import Tensor

import ffattr
from ffattr.analysis import rollout_maps
from ffattr.machine import name_processor

_STEPS = 16  # of Integrated Gradients

Scores = Callable[[Any, Tensor, int], Tensor]
"""Scores ``[T]`` of the tokens ``ids`` ``[1, T]`` for one logit of a model."""


def read_logit(model: Any, column: int, **given: Any) -> Tensor:
    """The logit ``[B]`` of a class, or of the token that comes next."""
    logits: Tensor = model(**given).logits
    return (logits if logits.dim() == 2 else logits[:, -1])[:, column]


def contributions(model: Any, ids: Tensor, column: int) -> Tensor:
    return ffattr.contributions(model, ids, target=column).scores[0, 0, 0]


def gradient_times_input(model: Any, ids: Tensor, column: int) -> Tensor:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(read_logit(model, column, inputs_embeds=embedded).sum(), embedded)
    found: Tensor = (gradient * embedded).sum(-1)[0].detach()
    return found


def integrated_gradients(model: Any, ids: Tensor, column: int) -> Tensor:
    explained = LayerIntegratedGradients(
        lambda given: read_logit(model, column, input_ids=given), model.get_input_embeddings()
    )
    found: Tensor = explained.attribute(ids, baselines=torch.zeros_like(ids), n_steps=_STEPS)
    total: Tensor = found.sum(-1)[0].detach()
    return total


def attention_rollout(model: Any, ids: Tensor, column: int) -> Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return _row_of_rollout(model, rollout_maps(attentions))


def _roll_maps(scope: str) -> Scores:
    def roll(model: Any, ids: Tensor, column: int) -> Tensor:
        return _row_of_rollout(model, rollout_maps(ffattr.attribute(model, ids, scopes=scope), scope))

    return roll


def _row_of_rollout(model: Any, shares: Tensor) -> Tensor:
    return shares[-1, 0, 0 if "Classification" in type(model).__name__ else -1]


def draw_at_random(model: Any, ids: Tensor, column: int) -> Tensor:
    return torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(int(ids.sum())))


METHODS: dict[str, Scores] = {
    "contributions": contributions,
    "gradient x input": gradient_times_input,
    f"integrated gradients, {_STEPS} steps": integrated_gradients,
    "attention rollout": attention_rollout,
    "norm rollout without FF": _roll_maps("atb"),
    "norm rollout with FF": _roll_maps("layer"),
    "random": draw_at_random,
}


def train_classifier(tokens: int) -> tuple[Any, list[Tensor], float]:
    """MiniLM with a head that tells the novel from the Bible, on the encoder as it is; the sentences' ids, and the
    share of them that it tells right."""
    import transformers

    loaded = minilm()
    torch.manual_seed(0)
    config = loaded.model.config
    config.num_labels = 2
    model = transformers.BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(loaded.model.state_dict(), strict=False)
    ids = [
        loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"] for text in CORPUS
    ]
    labels = torch.tensor([0] * len(SENTENCES) + [1] * (len(CORPUS) - len(SENTENCES)))
    with torch.no_grad():
        first = torch.cat([model.bert(one)[0][:, 0] for one in ids])
    head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW(head, 1e-3, weight_decay=0.1)
    for _ in range(200):
        logits = model.classifier(torch.tanh(model.bert.pooler.dense(first)))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, ids, float((logits.argmax(-1) == labels).float().mean())


def compare_methods(model: Any, ids: list[Tensor], remove: Any) -> dict[str, dict[str, float]]:
    """The areas over the perturbation curve of every method."""
    classifies = "Classification" in type(model).__name__
    fixed = [[classifies and place in (0, one.shape[1] - 1) for place in range(one.shape[1])] for one in ids]
    columns = []
    with torch.no_grad():
        for one in ids:
            logits = model(one).logits
            columns.append(int((logits if logits.dim() == 2 else logits[:, -1]).argmax()))
    found = {}
    for name, method in METHODS.items():
        scores = [method(model, one, column) for one, column in zip(ids, columns, strict=True)]
        rows = [one[0] for one in ids]
        found[name] = ffattr.evaluate(model, rows, scores, target=columns, remove=remove, fixed=fixed).aopc
    return found


def count_causes() -> tuple[int, list[str]]:
    """How often the cause of a completion is among the three words that speak most for it, and where it is not."""
    loaded = smollm2(head=True)
    missed = []
    for prompt in PROMPTS:
        asked = (prompt.answer, prompt.rival)
        found = ffattr.contributions(loaded.model, prompt.text, target=asked, tokenizer=loaded.tokenizer)
        best = found.scores[0, 0, 0].topk(3).indices.tolist()
        words = {loaded.tokenizer.convert_tokens_to_string([found.tokens[0][place]]).strip() for place in best}
        if words.isdisjoint(prompt.cause):
            missed.append(prompt.text)
    return len(PROMPTS) - len(missed), missed


def show_table(title: str, found: dict[str, dict[str, float]]) -> None:
    table = Table("method", "comprehensiveness", "sufficiency", "difference", title=title)
    for name, areas in found.items():
        table.add_row(name, *(f"{areas[key]:.3f}" for key in ("comprehensiveness", "sufficiency", "total")))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--remove", default="mask", choices=("mask", "delete"))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    right, missed = count_causes()
    print(f"the cause is among the first three words in {right} of {len(PROMPTS)} completions; missed: {missed}")
    classifier, ids, accuracy = train_classifier(chosen.tokens)
    print(f"the head tells {accuracy:.1%} of {len(ids)} sentences right")
    step = max(1, len(ids) // chosen.sentences)
    results: dict[str, Any] = {}
    content = {
        "machine": name_processor(CPU),
        "captum": captum.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arguments": vars(chosen),
        "accuracy": accuracy,
        "causes": {"right": right, "of": len(PROMPTS), "missed": missed},
        "aopc": results,
    }

    def keep_results(name: str, title: str, found: dict[str, dict[str, float]]) -> None:
        results[name] = found
        show_table(title, found)
        if chosen.write:  # at once: the second model takes most of an hour
            write_figures("faithfulness", content)

    found = compare_methods(classifier, ids[::step][: chosen.sentences], chosen.remove)
    keep_results("MiniLM-L6", "MiniLM-L6, two classes", found)
    loaded = smollm2(head=True)
    cut = [loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, : chosen.tokens] for text in CORPUS]
    found = compare_methods(loaded.model, cut[::step][: chosen.sentences], chosen.remove)
    keep_results("SmolLM2-135M", "SmolLM2-135M, the next token", found)


if __name__ == "__main__":
    main()
