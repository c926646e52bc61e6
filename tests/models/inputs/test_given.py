"""What a user passed as a model takes it, and the tokens that it makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from own_modules import mine
from tiny_models import build
from torch import Tensor, nn

from ffattr.decomposition.attention import AttentionWeights, QueryKey
from ffattr.models.capture.recorder import record_first_attention
from ffattr.models.inputs.given import find_valid, learn_tokens, read_given
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


class Takes(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return ids


class TakesAll(nn.Module):
    def forward(self, ids: Tensor, **more: Any) -> Tensor:
        return ids


def test_arguments_by_place_and_by_name() -> None:
    base, ids, mask = Takes(), torch.ones(1, 3), torch.zeros(1, 3)
    assert read_given(base, base, ids) == {"ids": ids}
    assert read_given(base, base, (ids, mask)) == {"ids": ids, "mask": mask}
    assert read_given(base, base, {"ids": ids, "mask": None, "scale": 2.0}) == {"ids": ids, "scale": 2.0}
    batch = {"other": ids}
    assert read_given(base, base, batch) == {"ids": batch}  # a forward that takes a batch
    assert read_given(TakesAll(), TakesAll(), {"ids": ids, "other": mask, "labels": ids}) == {"ids": ids, "other": mask}


def test_what_is_no_input() -> None:
    base = Takes()
    with pytest.raises(TypeError, match="inputs is a int, expected a mapping of tensors, a tensor, a tuple of them"):
        read_given(base, base, 3)
    with pytest.raises(TypeError, match=r"inputs has 4 tensors, but Takes\.forward takes 3 arguments by name"):
        read_given(base, base, (torch.ones(1),) * 4)
    with pytest.raises(
        TypeError, match=r"inputs has 'other', which Takes\.forward does not take; expected some of ids, mask"
    ):
        read_given(base, base, {"ids": torch.ones(1), "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"inputs is text .'a b'.; pass the model's tokenizer"):
        read_given(base, base, "a b")
    with pytest.raises(TypeError, match="tokenizer is a int"):
        read_given(base, base, ["a b"], 3)


def test_tokens_are_those_that_reach_the_first_attention() -> None:
    model, ids = mine(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = learn_tokens(resolve(model), {"ids": ids}, None)
    assert found.tokens == [["5", "6", "7"], ["8", "9", "10"]]
    assert found.mask.all()
    given = tiny_models.inputs("bert", padding="right")
    padded = learn_tokens(resolve(build("bert")), given, None)
    assert torch.equal(padded.mask, given["attention_mask"].bool())
    image = learn_tokens(resolve(build("vit")), tiny_models.inputs("vit"), None)
    assert image.tokens[0] == [str(place) for place in range(image.mask.shape[1])]


def test_the_models_own_words_where_it_does_not_run() -> None:
    with pytest.raises(ValueError, match=r"Mine does not run on ids \(1, 40\): "):
        record_first_attention(resolve(mine()), {"ids": torch.zeros(1, 40, dtype=torch.long)})


def test_padding_is_what_nobody_attends_to() -> None:
    q = torch.randn(2, 1, 3, 4)
    assert find_valid(QueryKey(q, q, 1.0)).tolist() == [[True] * 3] * 2
    mask = torch.tensor([True, True, False]).expand(2, 1, 3, 3)
    assert find_valid(QueryKey(q, q, 1.0, mask)).tolist() == [[True, True, False]] * 2
    alpha = torch.softmax(torch.randn(2, 1, 3, 3), -1) * torch.tensor([0.0, 1.0, 1.0])
    assert find_valid(AttentionWeights(alpha)).tolist() == [[False, True, True]] * 2
