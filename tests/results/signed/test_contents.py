"""Boundaries and targets by name, and texts whose scores add up to the numbers."""

import pytest
import torch
from made_contributions import contributions

from ffattr.results.signed.contents import find_boundary, find_target, list_texts, name_boundaries


def test_texts_and_their_biases_add_up_at_every_boundary():
    for encoder in (False, True):
        c = contributions(encoder=encoder)
        for place in range(4):
            texts = list_texts(c, place)
            assert [text.stack for text in texts] == (["encoder", "decoder"] if encoder else [""])
            total = sum(text.scores.sum(-1) + text.bias for text in texts)
            torch.testing.assert_close(total, c.value, rtol=1e-12, atol=1e-12)


def test_an_encoder_s_text_is_told_at_its_own_first_layer_where_all_of_it_is_followed():
    c = contributions(encoder=True)
    assert torch.equal(list_texts(c, 0)[0].scores, c.encoder.scores[:, 0])
    assert torch.equal(list_texts(c, 1)[0].scores, c.cross_scores[:, 1])
    later = contributions(encoder=True, layers=(1, 2))  # what layer 0 reads of the encoder is not in cross_scores
    assert torch.equal(list_texts(later, 0)[0].scores, later.cross_scores[:, 0])
    alone = contributions(encoder=True)
    alone.encoder = None
    assert torch.equal(list_texts(alone, 0)[0].scores, alone.cross_scores[:, 0])


def test_texts_leave_padding_out():
    (text,) = list_texts(contributions(), 1)
    ticks = text.label_tokens(1)
    assert (ticks.labels, ticks.positions.tolist()) == (["tok1.2", "tok1.3", "tok1.4", "tok1.5"], [2, 3, 4, 5])
    assert torch.equal(text.read_scores(1, 1), text.scores[1, 1, 2:])


def test_boundaries_are_called_by_their_layers():
    c = contributions(layers=(0, 3, 5))
    assert name_boundaries(c) == ["layer 0", "layer 3", "layer 5", "output"]
    assert [find_boundary(c, layer) for layer in (None, 0, 3, 5, -1, -2, -4)] == [0, 0, 1, 2, 3, 2, 0]
    for layer in (1, 6, -5):
        with pytest.raises(
            IndexError, match=rf"layer {layer} was not kept: there are the inputs of the layers 0, 3, 5"
        ):
            find_boundary(c, layer)
    with pytest.raises(TypeError, match="layer is 'last'"):
        find_boundary(c, "last")


def test_targets_and_sequences_by_number():
    c = contributions()
    assert find_target(c, -1, -2) == (1, 0)
    with pytest.raises(IndexError, match="target 2 does not exist: there are 2"):
        find_target(c, 2, 0)
    with pytest.raises(IndexError, match="batch 2 is out of range"):
        find_target(c, 0, 2)
    with pytest.raises(TypeError, match="target is ' Paris'"):
        find_target(c, " Paris", 0)
