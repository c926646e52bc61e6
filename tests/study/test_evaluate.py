"""Comprehensiveness and sufficiency: the model asked by hand, and one of which the truth is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import nn

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """A classifier whose logits are (0, sum of the ids that are there): what every token is worth is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []
        self.eval()

    def forward(self, input_ids, attention_mask):
        self.seen.append((input_ids.tolist(), attention_mask.tolist()))
        total = (input_ids * attention_mask).sum(-1).float() * self.scale
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(total), total], -1))


class CountingClassification(Counting):
    pass


IDS = torch.tensor([[5, 1, 2, 7]])


def probability(total: float) -> float:
    return float(torch.sigmoid(torch.tensor(0.1 * total)))


@pytest.mark.parametrize("remove", ["mask", "delete", 0])
def test_the_tokens_with_the_largest_scores_go_and_stay(remove):
    found = ffattr.evaluate(CountingClassification(), IDS, IDS.float(), target=1, remove=remove, shares=(0.25, 0.5))
    whole = probability(15)
    assert found.removed[:, 0].tolist() == [1, 2]
    expected = torch.tensor([[whole - probability(8)], [whole - probability(3)]])
    assert torch.allclose(found.comprehensiveness, expected.double(), atol=1e-6)
    expected = torch.tensor([[whole - probability(7)], [whole - probability(12)]])
    assert torch.allclose(found.sufficiency, expected.double(), atol=1e-6)
    assert found.aopc["total"] == pytest.approx(found.aopc["comprehensiveness"] - found.aopc["sufficiency"])


def test_better_scores_are_more_comprehensive_and_more_sufficient():
    model = CountingClassification()
    best, worst = (ffattr.evaluate(model, IDS, sign * IDS.float(), target=1).aopc for sign in (1, -1))
    assert best["comprehensiveness"] > worst["comprehensiveness"]
    assert best["sufficiency"] < worst["sufficiency"]


def test_what_is_fixed_stays_and_a_language_model_keeps_its_last_token():
    model = CountingClassification()
    ffattr.evaluate(model, IDS, IDS.float(), target=1, shares=(1.0,), fixed=[[True, False, False, False]])
    assert model.seen[-1][1] == [[1, 0, 0, 0], [1, 1, 1, 1]]
    reads_last = Counting()
    ffattr.evaluate(reads_last, IDS, IDS.float(), target=1, shares=(1.0,))
    assert reads_last.seen[-1][1][0] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="no token that may be taken away"):
        ffattr.evaluate(reads_last, IDS[:, -1:], torch.ones(1, 1), target=1)


@pytest.mark.parametrize(("name", "head"), [("gpt2", "LMHeadModel"), ("bert", "ForSequenceClassification")])
def test_a_real_model_is_asked_as_by_hand(name, head):
    model, ids = build(name, head=head), tiny_models.ids(2, 6)
    scores = ffattr.contributions(model, ids, target="predicted").scores[0, 0]
    found = ffattr.evaluate(model, ids, scores, remove="delete", shares=(0.4,))
    with torch.no_grad():
        for row in range(2):
            logits = model(ids[row : row + 1]).logits.reshape(1, -1, model.config.vocab_size if name == "gpt2" else 2)
            whole = logits[0, -1].softmax(-1)
            free = 5 if name == "gpt2" else 6
            gone = set(scores[row, :free].argsort(descending=True)[: -(-4 * free // 10)].tolist())
            rest = ids[row, [place for place in range(6) if place not in gone]][None]
            without = model(rest).logits.reshape(-1, len(whole))[-1].softmax(-1)
            best = int(whole.argmax())
            assert found.probability[row] == pytest.approx(float(whole[best]))
            assert found.comprehensiveness[0, row] == pytest.approx(float(whole[best] - without[best]))
    frame = found.to_pandas()
    assert len(frame) == 2
    assert set(frame["removed"]) == {-(-4 * free // 10)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": torch.ones(1, 3)}, "sequence 0 has 4 ids of torch.int64, 3 scores"),
        ({"scores": torch.full((1, 4), float("nan"))}, "scores of sequence 0 have entries that are NaN"),
        ({"scores": torch.ones(2, 4)}, "1 sequences, 2 rows of scores"),
        ({"remove": "hide"}, "remove is 'hide'"),
        ({"shares": (0.5, 1.5)}, "shares are"),
        ({"shares": ()}, "shares are"),
        ({"target": 2}, "target is 2, but the model has 2 logits"),
        ({"target": [1, 1]}, "target has 2 entries for 1 sequences"),
        ({"ids": []}, "no sequences"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    given = {"ids": IDS, "scores": torch.ones(1, 4), "target": 1} | changed
    with pytest.raises(ValueError, match=message):
        ffattr.evaluate(CountingClassification(), **given)
    with pytest.raises(ValueError, match="training mode"):
        ffattr.evaluate(CountingClassification().train(), IDS, torch.ones(1, 4))
