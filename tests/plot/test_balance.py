"""The network beside what bypasses it, and beside the gain of a norm."""

import pandas as pd
import pytest

from ffattr.plot import alignment_chart, gain_chart


def _angles(**columns):
    rows = [(layer, of, 0.1 * layer - 0.5, 1.0 + layer) for layer in (1, 0, 2) for of in ("own", "others")]
    return pd.DataFrame(rows, columns=["layer", "pairs_of", "median", "ratio"]).assign(**columns)


def test_cosines_and_lengths_by_layer():
    figure = alignment_chart(_angles(), "a title")
    cosines, lengths = figure.axes
    assert cosines.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert cosines.lines[0].get_ydata() == pytest.approx([-0.5, -0.4, -0.3])
    assert lengths.lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0]
    assert figure.get_suptitle() == "a title"
    assert figure.get_supylabel() == "pairs of different tokens"
    assert cosines.get_ylim() != lengths.get_ylim()


def test_own_pairs_where_there_are_no_others_and_a_line_for_each_model():
    own = _angles().query("pairs_of == 'own'")
    assert alignment_chart(own).get_supylabel() == "a token and itself"
    figure = alignment_chart(pd.concat([_angles(model="a"), _angles(model="b")]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_dot_for_each_dimension():
    frame = pd.DataFrame({"layer": [3, 3, 3, 5], "gain": [0.5, 1.0, 0.0, 2.0], "ff": [0.1, 0.2, 0.3, 0.4], "rho": -0.5})
    figure = gain_chart(frame)
    first, second = figure.axes
    assert first.lines[0].get_xydata().tolist() == [[0.1, 0.5], [0.2, 1.0]]
    assert (first.get_title(), second.get_title()) == ("layer 3, \u03c1 = \u22120.50", "layer 5, \u03c1 = \u22120.50")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("draw", [alignment_chart, gain_chart])
def test_wrong_frames_are_named(draw):
    with pytest.raises(ValueError, match="the frame lacks"):
        draw(pd.DataFrame({"layer": [0]}))
