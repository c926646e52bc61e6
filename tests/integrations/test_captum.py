"""`TokenContributions` is what captum's own objects are, and gives what `ffattr.contributions` gives."""

from __future__ import annotations

import inspect
from typing import Any

import captum.attr
import pytest
import tiny_models
import torch

import ffattr
from ffattr.integrations.captum import TokenContributions

IDS = torch.tensor([[2, 4, 5, 6, 3], [2, 10, 12, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def classifier() -> Any:
    return tiny_models.build("bert", head="ForSequenceClassification")


def test_it_is_called_as_captums_are() -> None:
    """The arguments that captum's method for layers has and that mean something here, by the same names."""
    ours = inspect.signature(TokenContributions.attribute).parameters
    captums = inspect.signature(captum.attr.LayerGradientXActivation.attribute).parameters
    shared = ["inputs", "target", "additional_forward_args"]
    assert [name for name in ours if name in captums] == ["self", *shared]
    assert "return_convergence_delta" in inspect.signature(captum.attr.IntegratedGradients.attribute).parameters
    assert issubclass(TokenContributions, captum.attr.Attribution)
    assert TokenContributions.get_name() == "Token Contributions"


@pytest.mark.parametrize("given", [MASK, (MASK,), {"attention_mask": MASK}], ids=["value", "tuple", "names"])
def test_scores_are_those_of_contributions(classifier: Any, given: Any) -> None:
    method = TokenContributions(classifier, value_bias="separate")
    assert method.has_convergence_delta()
    scores, delta = method.attribute(IDS, target=1, additional_forward_args=given, return_convergence_delta=True)
    found = ffattr.contributions(
        classifier, {"input_ids": IDS, "attention_mask": MASK}, target=1, value_bias="separate"
    )
    assert scores.shape == IDS.shape
    assert torch.equal(scores, found.scores[0, 0])
    assert delta.shape == (2,)
    assert delta.abs().max() < 1e-9
    assert scores[1, 4] == 0


@pytest.mark.parametrize(
    "target", [None, torch.tensor([1, 0]), torch.tensor(1), 1], ids=["first", "each", "one", "int"]
)
def test_targets(classifier: Any, target: Any) -> None:
    """One for all, one for each sequence, or the first choice, as captum's ``target``."""
    given = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        logits = classifier(**given).logits
    wanted = logits.argmax(-1) if target is None else torch.as_tensor(target).expand(2)
    scores = TokenContributions(classifier).attribute(IDS, target, MASK)
    for row, number in enumerate(wanted.tolist()):
        alone = ffattr.contributions(classifier, given, target=number)
        assert torch.allclose(scores[row], alone.scores[0, 0, row], rtol=0, atol=1e-12)


def test_an_encoders_ids_are_the_inputs() -> None:
    model = tiny_models.build("bart", head="ForConditionalGeneration")
    given = tiny_models.inputs("bart")
    ids = given.pop("input_ids")
    method = TokenContributions(model)
    scores, delta = method.attribute(ids, target=3, additional_forward_args=given, return_convergence_delta=True)
    found = ffattr.contributions(model, {"input_ids": ids, **given}, target=3)
    assert found.encoder is not None
    assert torch.equal(scores, found.encoder.scores[0, 0])
    assert delta.abs().max() < 1e-9


def test_too_many_values_are_an_error(classifier: Any) -> None:
    with pytest.raises(ValueError, match=r"additional_forward_args has 99 values, forward takes \d+ more"):
        TokenContributions(classifier).attribute(IDS, 1, (None,) * 99)
