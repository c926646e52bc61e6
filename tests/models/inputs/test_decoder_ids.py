"""What a decoder reads where the model makes it itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, ids, inputs

import ffattr
from ffattr.models.inputs.decoder_ids import learn_decoder_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def with_ends(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Ends every sequence as classifiers of these families expect."""
    tokens = tokens.clone()
    tokens[:, -1] = end
    return tokens


@pytest.mark.parametrize("name", ["bart", "mbart", "plbart", "t5"])
def test_classifiers_shift_what_the_encoder_reads(name: str) -> None:
    model: Any = build(name, head="ForSequenceClassification")
    given = {"input_ids": with_ends(ids(2, 7), model.config.eos_token_id)}
    read: list[torch.Tensor] = []
    hook = model.base_model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    learned = learn_decoder_ids(model.base_model, model, given)
    assert learned is not None
    torch.testing.assert_close(learned, read[0], rtol=0, atol=0)
    found = ffattr.attribute(model, given)
    expected = ffattr.attribute(model, {**given, "decoder_input_ids": read[0]})
    for stack, one in expected.stacks.items():
        torch.testing.assert_close(found.stacks[stack]["layer"], one["layer"], rtol=0, atol=0)


def test_whisper_with_labels() -> None:
    model: Any = build("whisper", head="ForConditionalGeneration")
    given = {"input_features": inputs("whisper")["input_features"], "labels": ids(2, 5)}
    found = ffattr.attribute(model, given)
    assert found.stacks["decoder"].tokens[0][1:] == [str(one) for one in given["labels"][0, :-1].tolist()]
    assert float(found.stacks["decoder"].error.max()) < 1e-6


def test_nothing_to_learn() -> None:
    """A model that asks for them itself, and one without a decoder."""
    model = build("t5")
    assert learn_decoder_ids(model, model, {"input_ids": ids(2, 7)}) is None
    encoder = build("bert")
    assert learn_decoder_ids(encoder, encoder, {"input_ids": ids(2, 7)}) is None
    with pytest.raises(ValueError, match="inputs has no 'decoder_input_ids'"):
        ffattr.attribute(model, {"input_ids": ids(2, 7)})
