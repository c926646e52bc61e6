"""What tokens give to a number, as a picture."""

import io
from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_rgb

from ffattr.plot import ScoredText, score_figure
from ffattr.plot.style import SIGNED

SCORES = torch.tensor([2.0, -1.0, 0.0, 0.5])
LAYERS = torch.stack([SCORES, SCORES / 2])


def text(scores=SCORES, layers=LAYERS, **changed):
    names = [f"w{n}" for n in range(len(scores))]
    made = ScoredText([f" {name}" for name in names], names, scores, layers, ["layer 0", "output"])
    return replace(made, **changed)


def written(axes):
    return [one.get_text() for one in axes.texts]


def test_blue_is_for_the_number_and_orange_against_it():
    figure = score_figure([text(mark=3)], {"bias": 0.25}, 1.75, "a $title$")
    assert figure.axes[0].get_title(loc="left") == r"a \$title\$"
    boxes = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches if patch.get_fill()]
    for at, colour in ((0, SIGNED[-1]), (2, SIGNED[4])):
        assert boxes[at] == pytest.approx(to_rgb(colour), abs=0.01)
    assert boxes[0][2] > boxes[0][0]
    assert boxes[1][0] > boxes[1][2]
    assert [one for one in written(figure.axes[0]) if one[0] in "+\u2212"] == ["+2", "\u22121", "+0.5"]
    assert len([patch for patch in figure.axes[0].patches if not patch.get_fill()]) == 1


def test_the_sum_ends_at_the_number():
    figure = score_figure([text()], {"bias": 0.25}, 1.75)
    bars = figure.axes[1].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 2.5), (2.5, -1.0), (1.5, 0.25), (0, 1.75)]
    assert written(figure.axes[1]) == [
        *("for it", "+2.5", "against", "\u22121", "bias", "+0.25", "the number", "+1.75"),
    ]


def test_the_map_has_a_row_for_each_boundary_in_the_colours_of_the_text():
    figure = score_figure([text()], {}, 1.5)
    axes = figure.axes[-1]
    assert torch.equal(torch.as_tensor(axes.images[0].get_array()), LAYERS.double().float())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "output"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["w0", "w1", "w2", "w3"]
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (-2, 2)


def test_one_score_far_beyond_the_others_leaves_them_their_colours():
    scores = torch.tensor([100.0, *[1.0] * 9])
    figure = score_figure([text(scores, torch.stack([scores] * 2))], {}, 109.0)
    assert figure.axes[-1].images[0].norm.vmax == 2.0


def test_two_texts_share_a_scale_and_a_sum():
    second = text(SCORES * 2, LAYERS * 2, name="decoder")
    figure = score_figure([text(name="encoder"), second], {"bias": 0.0}, 4.5)
    assert "encoder" in written(figure.axes[0])
    assert [one for one in written(figure.axes[2]) if one[0].isalpha()] == [
        *("encoder for it", "encoder against", "decoder for it", "decoder against", "bias", "the number"),
    ]
    assert len([axes for axes in figure.axes if axes.images and axes.get_yticks().size]) == 2


@pytest.mark.parametrize("tokens", [1, 200, 3000])
def test_any_length_is_drawn(tokens):
    scores = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
    scores[-1] = 5.0
    figure = score_figure([text(scores, torch.stack([scores, -scores]))], {"bias": 0.0}, float(scores.sum()))
    figure.savefig(io.BytesIO(), dpi=30)
    shown = len([patch for patch in figure.axes[0].patches if patch.get_fill()])
    assert shown == min(tokens, 400)
    image = torch.as_tensor(figure.axes[-1].images[0].get_array())
    assert image.shape[1] == (tokens if tokens < 1200 else 1000)
    assert image.max() == 5.0  # the largest by size stays where columns are drawn together
    if tokens == 3000:
        assert "tokens " in written(figure.axes[0])[-1]
        assert "of 3000; the others give" in written(figure.axes[0])[-1]
        assert "3 tokens in a column" in figure.axes[-1].get_title(loc="left")


def test_wrong_shapes_and_no_tokens_say_so():
    with pytest.raises(ValueError, match=r"needs as many labels, scores \[4\] and layers \[2, 4\], got 4, \[3\] and"):
        score_figure([replace(text(), scores=SCORES[:3])], {}, 0.0)
    with pytest.raises(ValueError, match="got no tokens"):
        score_figure([], {}, 0.0)
    with pytest.raises(ValueError, match="cmap='no'"):
        score_figure([text()], {}, 0.0, cmap="no")
