"""Contributions of words."""

import pytest
import torch
from made_contributions import contributions

from ffattr import TopK
from ffattr.results.kept.pool import PooledMaps

PIECES = [["[PAD]", "[PAD]", "un", "##believ", "##able", "[SEP]"]]


def by_hand(values, dim=-1):
    """The columns of the words ``unbelievable`` and ``[SEP]``, behind two of padding."""
    values = values.movedim(dim, -1)
    return torch.stack([values[..., 2:5].sum(-1), values[..., 5]], -1).movedim(-1, dim)


@pytest.mark.parametrize("flow", [True, "heads"])
def test_words_are_sums_of_their_tokens_and_so_is_flow_between_them(flow):
    c = contributions(real=(4,), flow=flow)
    c.tokens = PIECES
    found = c.to_words()
    assert found.tokens == [["unbelievable", "[SEP]"]]
    assert found.mask.tolist() == [[True, True]]
    torch.testing.assert_close(found.scores, by_hand(c.scores), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.scores.sum(-1) + found.bias, c.value[:, None].expand(2, 4, 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.flow, by_hand(by_hand(c.flow), -2), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.residual, by_hand(c.residual), rtol=1e-14, atol=1e-14)
    assert found.positions.tolist() == [[1], [1]]
    c.positions = torch.tensor([[3], [-1]])
    assert c.to_words().positions.tolist() == [[0], [-1]]


def test_words_that_are_given():
    c = contributions(real=(6,), flow=False)
    found = c.to_words(words=[[None, 0, 0, 1, 1, None]])
    assert found.scores.shape == (2, 4, 1, 4)
    torch.testing.assert_close(found.scores[..., 1], c.scores[..., 1:3].sum(-1))
    with pytest.raises(ValueError, match="expected None for an encoder and a decoder"):
        contributions(encoder=True).to_words(words=[[None] * 6] * 2)


def test_flow_that_was_not_kept_whole_is_left_out():
    c = contributions()
    c.kept = PooledMaps({"flow": c.flow[..., ::2, ::2].flatten(0, 1)}, block=2)
    assert c.to_words().kept is None
    c.kept = TopK(1).kept()
    assert c.to_words().kept is None


def test_words_of_an_encoder_and_a_decoder():
    c = contributions(real=(6,), encoder=True)
    c.cross_tokens = c.encoder.tokens = [["a", "b", "##c", "d", "##e"]]
    found = c.to_words()
    assert found.cross_tokens == found.encoder.tokens == [["a", "bc", "de"]]
    assert found.cross_scores.shape == (2, 4, 1, 3)
    torch.testing.assert_close(found.cross_scores.sum(-1), c.cross_scores.sum(-1))
    torch.testing.assert_close(found.encoder.scores[..., 1], c.encoder.scores[..., 1:3].sum(-1))
    assert found.cross_flow.shape == (2, 3, 1, 6, 3)
    torch.testing.assert_close(found.cross_flow.sum((-1, -2)), c.cross_flow.sum((-1, -2)))


def test_sentences_are_sums_of_their_tokens():
    c = contributions(real=(6, 4))
    c.tokens = [["[CLS]", "go", ".", "now", "!", "[SEP]"], ["[PAD]", "[PAD]", "a", "b", "?", "c"]]
    found = c.to_sentences()
    assert found.tokens == [["[CLS]", "go.", "now!", "[SEP]"], ["a b?", "c", "", ""]]
    torch.testing.assert_close(found.scores[:, :, 0, 1], c.scores[:, :, 0, 1:3].sum(-1))
    torch.testing.assert_close(found.scores[:, :, 1, 0], c.scores[:, :, 1, 2:5].sum(-1))
    torch.testing.assert_close(found.flow.sum((-1, -2)), c.flow.sum((-1, -2)))
    assert found.positions.tolist() == [[3, 1], [3, 1]]


def test_sentences_of_an_encoder_and_a_decoder():
    c = contributions(real=(6,), encoder=True)
    c.cross_tokens = c.encoder.tokens = [["a", ".", "d", "##e", "."]]
    found = c.to_sentences()
    assert found.cross_tokens == found.encoder.tokens == [["a.", "de."]]
    torch.testing.assert_close(found.encoder.scores[..., 1], c.encoder.scores[..., 2:].sum(-1))
