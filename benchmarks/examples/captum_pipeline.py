"""ffattr where a pipeline expects one of captum's attribution objects, beside captum's LayerIntegratedGradients.

The model's output is how near a text comes to a question, by MiniLM's sentence vectors. For token ids both objects give
``[B, T]``, but answer different questions. Integrated gradients are signed and about this one output: they sum to what
it gains over the same text of [PAD]. Maps multiplied along the layers know no output and no sign: they say in which
shares, which sum to 1, the tokens are in the vectors whose mean the sentence vector is. Little agreement is no error.
Run: ``python benchmarks/examples/captum_pipeline.py [page.html]`` (the page is captum's, and takes IPython)
"""

from __future__ import annotations

import sys
from pathlib import Path

from captum.attr import Attribution, LayerIntegratedGradients
from captum.attr import visualization as viz
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from models import minilm

import ffattr
from ffattr.analysis import rollout_maps, spearman

TEXTS = ["Cats sleep for most of the day, often in the sun.", "The bank raised its interest rates again."]
QUESTION = "How long do cats sleep?"


class MapShares(Attribution):  # type: ignore[misc]  # captum is untyped here
    """Shares ``[B, T]`` of the input tokens in the mean of the last vectors. There is no baseline and no target."""

    def __init__(self, model: nn.Module, scope: str = "layer") -> None:
        super().__init__(model)
        self.scope = scope

    def attribute(self, inputs: Tensor, additional_forward_args: Tensor) -> Tensor:
        """``inputs`` are ids ``[B, T]``, what else there is their attention mask."""
        given = {"input_ids": inputs, "attention_mask": additional_forward_args}
        shares = rollout_maps(ffattr.attribute(self.forward_func, given, scopes=self.scope), self.scope)[-1]
        return shares.sum(1) / additional_forward_args.sum(1, keepdim=True)  # rows of padding are zero


def sentence_vectors(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    hidden: Tensor = model(input_ids, attention_mask).last_hidden_state
    return nn.functional.normalize((hidden * attention_mask[..., None]).sum(1), dim=-1)


def main() -> None:
    model, tokenizer = minilm()
    options = {"return_tensors": "pt", "return_token_type_ids": False}
    wanted = sentence_vectors(model, **tokenizer(QUESTION, **options))[0].detach()
    ids, mask = tokenizer(TEXTS, padding=True, **options).values()
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    blank = ids.where(special, tokenizer.pad_token_id)

    gradients = LayerIntegratedGradients(lambda *given: sentence_vectors(model, *given) @ wanted, model.embeddings)
    by_embedding = gradients.attribute(ids, baselines=blank, additional_forward_args=mask, n_steps=32)
    found = {"gradients": by_embedding.sum(-1).detach()}
    for name, scope in (("maps", "layer"), ("maps, no FF", "atb")):
        found[name] = MapShares(model, scope).attribute(ids, additional_forward_args=mask)

    near, records = (sentence_vectors(model, ids, mask) @ wanted).tolist(), []
    for row, words in enumerate((mask > 0) & ~special):
        names = tokenizer.convert_ids_to_tokens(ids[row][words])
        here = {name: values[row][words] for name, values in found.items()}
        print(f"\n{TEXTS[row]} (nearness {near[row]:.2f})\n{'':12s}" + "".join(f"{name:>13s}" for name in here))
        for place, name in enumerate(names):
            print(f"{name:12s}" + "".join(f"{float(of[place]):13.3f}" for of in here.values()))
        for name in ("maps", "maps, no FF"):
            print(f"rank correlation of |gradients| and {name}: {spearman(here['gradients'].abs(), here[name]):.2f}")
        for name, of in here.items():
            shown = (of / of.abs().max(), near[row], "near", QUESTION, name, float(of.sum()), names, 0.0)
            records.append(viz.VisualizationDataRecord(*shown))
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(viz.visualize_text(records).data, encoding="utf-8")


if __name__ == "__main__":
    main()
