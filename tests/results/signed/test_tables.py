"""Contributions as tables."""

import pytest
import torch
from made_contributions import contributions


def test_a_row_for_each_token_and_boundary_and_one_for_the_bias():
    c = contributions(layers=(0, 2, 5))
    frame = c.to_pandas()
    assert list(frame) == ["target", "name", "read_at", "batch", "boundary", "layer", "position", "token", "score"]
    assert len(frame) == 2 * 4 * (6 + 1 + 4 + 1)  # targets, boundaries, real tokens of both sequences, biases
    sums = frame.groupby(["target", "batch", "boundary"])["score"].sum()
    assert all(sums[k, b, place] == pytest.approx(float(c.value[k, b])) for k, b, place in sums.index)
    one = frame[(frame.target == 1) & (frame.batch == 1) & (frame.layer == 5)]
    assert one.boundary.unique().tolist() == [2]
    assert one.position.tolist() == [2, 3, 4, 5, -1]
    assert one.token.tolist() == ["tok1.2", "tok1.3", "tok1.4", "tok1.5", "(bias)"]
    assert one.score.tolist() == [*c.scores[1, 2, 1, 2:].tolist(), float(c.bias[1, 2, 1])]
    assert one.name.unique().tolist() == [" target 1.1"]
    assert one.read_at.unique().tolist() == [5]
    assert frame[frame.layer.isna()].boundary.unique().tolist() == [3]


def test_rows_of_an_encoder_and_a_decoder_add_up_with_what_passes_between_them():
    c = contributions(encoder=True)
    frame = c.to_pandas()
    assert set(frame["stack"]) == {"decoder", "cross", "encoder"}
    sums = frame.groupby(["stack", "target", "batch", "boundary"], observed=True)["score"].sum()
    for k in range(2):
        for b in range(2):
            for place in range(4):
                total = sums["decoder", k, b, place] + sums["cross", k, b, place]
                assert total == pytest.approx(float(c.value[k, b]))
            assert sums["encoder", k, b, 1] == pytest.approx(float(c.encoder.value[k, b]))
    assert (frame[frame["stack"] == "cross"].position >= 0).all()


def test_bfloat16_scores_have_rows():
    c = contributions()
    c.scores = c.scores.bfloat16()
    assert len(c.to_pandas()) == 96


def test_top_takes_the_largest_by_size_and_keeps_the_sign():
    c = contributions(targets=1, real=(6,))
    c.scores[0, 1, 0] = torch.tensor([0.5, -3.0, 0.0, 2.0, -2.0, 1.0])
    found = c.top(3, layer=1)
    assert found[["position", "score", "rank"]].values.tolist() == [[1, -3.0, 1], [3, 2.0, 2], [4, -2.0, 3]]
    assert found.token.tolist() == ["tok0.1", "tok0.3", "tok0.4"]
    assert len(c.top(10, layer=1)) == 5  # a zero gives nothing
    assert c.top(1).score.tolist() == [float(c.scores[0, 0, 0][c.scores[0, 0, 0].abs().argmax()])]
    with pytest.raises(ValueError, match=r"top\(k=0\)"):
        c.top(0)
    with pytest.raises(IndexError, match="layer 7 was not kept"):
        c.top(1, layer=7)


def test_top_ranks_both_texts_together():
    c = contributions(targets=1, real=(6,), encoder=True)
    c.scores[0, 0, 0, 4], c.encoder.scores[0, 0, 0, 2] = 8.0, -9.0
    found = c.top(2)
    assert found[["stack", "position", "score"]].values.tolist() == [["encoder", 2, -9.0], ["decoder", 4, 8.0]]
