"""What models do with the output of their last layer, as data: where each part of a head is.

An entry is tried where all its paths are there, and believed only where what follows from it is the model's own output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FACTORS", "FINAL_NORMS", "HEADS", "HeadEntry", "Reading"]

Reading = Literal["position", "first", "last", "mean", "rest"]
"""Which tokens a head reads: the one at the position asked for, the first, the last, the mean of all, or of all but
those that come before an image's patches."""


@dataclass(frozen=True)
class HeadEntry:
    """``steps``: paths from the model, of projections, norms and activations; ``"=gelu"`` is a function without a
    module. The last one makes the logits. ``reads``: what stands side by side of what they are applied to.
    """

    steps: tuple[str, ...]
    reads: tuple[Reading, ...] = ("position",)


FINAL_NORMS: tuple[tuple[str, ...], ...] = (
    (),
    ("norm",),
    ("ln_f",),
    ("final_layernorm",),
    ("final_layer_norm",),
    ("final_norm",),
    ("norm_f",),
    ("layernorm",),
    ("layer_norm",),
    ("post_layernorm",),
    ("encoder.layer_norm",),
    ("encoder.final_layer_norm",),
    ("encoder.norm",),
    ("encoder.ln",),
    ("decoder.norm",),
    ("decoder.layer_norm",),
    ("decoder.final_layer_norm",),
    ("decoder.final_layer_norm", "decoder.project_out"),
    ("decoder.project_out",),
)
"""Paths from the base model of what every token passes behind the last layer."""

_BERT_LM = ("cls.predictions.transform.dense", "cls.predictions.transform.transform_act_fn")

HEADS: tuple[HeadEntry, ...] = (
    # To the vocabulary.
    HeadEntry((*_BERT_LM, "cls.predictions.transform.LayerNorm", "cls.predictions.decoder")),
    HeadEntry(
        ("cls.predictions.dense", "cls.predictions.activation", "cls.predictions.LayerNorm", "cls.predictions.decoder")
    ),
    HeadEntry(("predictions.dense", "predictions.activation", "predictions.LayerNorm", "predictions.decoder")),
    HeadEntry(("lm_head.dense", "=gelu", "lm_head.layer_norm", "lm_head.decoder")),
    HeadEntry(("lm_head.dense", "=relu", "lm_head.layer_norm", "lm_head.decoder")),
    HeadEntry(("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")),
    HeadEntry(
        (
            "generator_predictions.dense",
            "generator_predictions.activation",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
        )
    ),
    HeadEntry(("head.dense", "head.act", "head.norm", "decoder")),
    HeadEntry(("lm_head",)),
    HeadEntry(("proj_out",)),
    # To classes, of each token or of the whole.
    HeadEntry(("classifier",)),
    HeadEntry(("score",)),
    HeadEntry(("score",), ("last",)),
    HeadEntry(("head.dense", "head.act", "head.norm", "classifier")),
    HeadEntry(("head.dense", "head.act", "head.norm", "classifier"), ("first",)),
    HeadEntry(("head.dense", "head.act", "head.norm", "classifier"), ("mean",)),
    HeadEntry(("base_model.pooler.dense", "base_model.pooler.activation", "classifier"), ("first",)),
    HeadEntry(("base_model.pooler", "base_model.pooler_activation", "classifier"), ("first",)),
    HeadEntry(("base_model.pooler.layernorm", "classifier"), ("rest",)),
    HeadEntry(("pooler.dense", "=gelu", "classifier"), ("first",)),
    HeadEntry(("pre_classifier", "=relu", "classifier"), ("first",)),
    HeadEntry(("classifier.dense", "=tanh", "classifier.out_proj"), ("first",)),
    HeadEntry(("classifier.dense", "classifier.activation", "classifier.out_proj"), ("first",)),
    HeadEntry(("classifier.dense", "=gelu", "classifier.out_proj"), ("first",)),
    HeadEntry(("classification_head.dense", "=tanh", "classification_head.out_proj"), ("last",)),
    HeadEntry(("projector", "classifier"), ("mean",)),
    HeadEntry(("classifier",), ("first",)),
    HeadEntry(("classifier",), ("rest",)),
    HeadEntry(("classifier",), ("mean",)),
    HeadEntry(("classifier",), ("first", "rest")),
)
"""Tried one after the other."""

FACTORS: tuple[tuple[str, Literal["times", "over"]], ...] = (
    ("logit_scale", "times"),
    ("logits_scaling", "over"),
    ("lm_head_multiplier", "times"),
)
"""Settings of a configuration that logits are multiplied or divided by."""
