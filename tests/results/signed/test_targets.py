"""Sums of numbers, and one of them alone."""

import pytest
import torch
from made_contributions import contributions

from ffattr import TopK


@pytest.mark.parametrize("encoder", [False, True])
def test_what_is_given_to_a_sum_is_the_sum(encoder):
    c = contributions(targets=3, encoder=encoder)
    found = c.add_targets([0, 2], name="answer")
    assert found.targets == [["answer", "answer"]]
    torch.testing.assert_close(found.value[0], c.value[0] + c.value[2])
    torch.testing.assert_close(found.flow[0], c.flow[0] + c.flow[2])
    torch.testing.assert_close(found.residual[0], c.residual[0] + c.residual[2])
    total = found.scores.sum(-1) + found.bias
    if encoder:
        total = total + found.cross_scores.sum(-1)
        torch.testing.assert_close(found.cross_flow[0], c.cross_flow[0] + c.cross_flow[2])
        torch.testing.assert_close(found.encoder.scores[0], c.encoder.scores[0] + c.encoder.scores[2])
    torch.testing.assert_close(total, found.value[:, None].expand_as(total))
    assert found.error.shape == (1, 2)
    assert found.error.max() < 1e-14


def test_error_of_a_sum_is_how_far_it_is_off():
    c = contributions(targets=2, flow=False)
    c.bias = c.bias.clone()
    c.bias[1, 2, 0] += 1e-3
    found = c.add_targets()
    parts = found.scores[0, 2, 0].abs().sum(), found.value[0, 0].abs(), found.bias[0, 2, 0].abs()
    torch.testing.assert_close(found.error[0, 0], 1e-3 / max(parts))
    assert found.error[0, 1] < 1e-14


def test_names_and_places_of_a_sum():
    c = contributions(targets=2, flow=False)
    c.positions = torch.tensor([[5, 4], [5, 3]])
    found = c.add_targets()
    assert found.targets == [[" target 0.0 +  target 1.0", " target 0.1 +  target 1.1"]]
    assert found.positions.tolist() == [[5, -1]]


def test_flow_that_was_not_kept_whole_is_left_out():
    c = contributions()
    c.kept = TopK(1).kept()
    assert c.add_targets().kept is None


def test_one_number_alone():
    c = contributions(targets=2, encoder=True)
    found = c.select(1)
    assert torch.equal(found.scores, c.scores[1:])
    assert torch.equal(found.encoder.bias, c.encoder.bias[1:])
    assert found.kept is None
    assert found.targets == c.targets[1:]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([2], IndexError, "target 2 does not exist; there are 2, from 0 to 1"),
        ([-1], IndexError, "target -1"),
        ([0, 0], ValueError, r"\[0, 0\], expected each of some numbers once"),
        ([], ValueError, "expected each of some"),
    ],
)
def test_numbers_that_do_not_exist(asked, error, message):
    with pytest.raises(error, match=message):
        contributions().add_targets(asked)
