"""A method for inseq: importing this module registers `ffattr.contributions` under the name ``"ffattr"``.

    import inseq, ffattr.integrations.inseq
    model = inseq.load_model(name, "ffattr")
    model.attribute("The capital of France is", value_bias="separate").show()

For every generated token inseq asks for the tokens before it; what comes back are what these give to the token's logit,
with signs, whatever inseq's ``attributed_fn`` is. Written for inseq 0.7.
"""

from __future__ import annotations

from typing import Any

from inseq.attr.feat.feature_attribution import FeatureAttribution
from inseq.data import FeatureAttributionStepOutput
from inseq.utils.typing import InseqAttribution
from torch import Tensor

from ..pipeline.contributions import contributions

__all__ = ["ContributionsMethod"]


class _Contributions(InseqAttribution):  # type: ignore[misc]  # inseq is untyped here
    """One step: ``forward_func`` is inseq's wrapper of the model."""

    def attribute(
        self,
        inputs: tuple[Tensor, ...],
        additional_forward_args: tuple[Any, ...],
        ig: Any = "exact",
        baseline: Any = "zero",
        value_bias: str = "token",
    ) -> FeatureAttributionStepOutput:
        """Returns what tokens give to the next one, ``[B, S]`` of the source and ``[B, T]`` of the target so far.

        ``inputs`` are embeddings, of source, target or both, and say no more here than which are asked for; of
        ``additional_forward_args`` the ids, the next token, and the masks behind inseq's function are read.
        """
        is_seq2seq = self.forward_func.is_encoder_decoder
        whole = len(inputs) == 2 or not is_seq2seq
        behind = 0 if whole else 1  # the target's embeddings
        given = [value for value in additional_forward_args[behind:] if isinstance(value, Tensor)]
        names = ["input_ids", "next", "attention_mask"]
        if is_seq2seq:
            names = ["input_ids", "decoder_input_ids", "next", "attention_mask", "decoder_attention_mask"]
        taken = dict(zip(names, given, strict=False))
        chosen, rows = taken.pop("next").flatten().unique(return_inverse=True)
        options = {"ig": ig, "baseline": baseline, "value_bias": value_bias}
        found = contributions(self.forward_func.model, taken, target=chosen.tolist(), **options)
        own = found.scores[rows, 0, range(len(rows))]
        if found.encoder is None:
            return FeatureAttributionStepOutput(source_attributions=None, target_attributions=own, step_scores={})
        source = found.encoder.scores[rows, 0, range(len(rows))]
        return FeatureAttributionStepOutput(
            source_attributions=source, target_attributions=own if whole else None, step_scores={}
        )


class ContributionsMethod(FeatureAttribution):  # type: ignore[misc]
    """The method ``"ffattr"``; ``ig``, ``baseline`` and ``value_bias`` may be given to ``model.attribute``."""

    method_name = "ffattr"

    def __init__(self, attribution_model: Any, **kwargs: Any) -> None:
        super().__init__(attribution_model, **kwargs)
        self.use_predicted_target = (
            False  # another attributed_fn than the default is not what is computed: inseq says so
        )
        self.method = _Contributions(attribution_model)

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> FeatureAttributionStepOutput:
        return self.method.attribute(**attribute_fn_main_args, **(attribution_args or {}))
