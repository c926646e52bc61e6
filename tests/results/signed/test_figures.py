"""Pictures of contributions: that they show what the tensors hold."""

from dataclasses import replace

import pytest
import torch
from made_contributions import contributions

from ffattr.results.kept.dense import DenseMaps
from ffattr.results.kept.policy import Kept


def image(axes):
    return torch.as_tensor(axes.images[0].get_array()).double()


def test_a_picture_of_one_target_and_sequence_without_padding():
    c = contributions()
    figure = c.plot(1, 1)
    assert figure.axes[0].get_title(loc="left") == "what speaks for “ target 1.1”, read at token 5"
    torch.testing.assert_close(image(figure.axes[-1]), c.scores[1, :, 1, 2:], rtol=1e-6, atol=0)
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == [
        "layer 0",
        "layer 1",
        "layer 2",
        "output",
    ]
    bars = figure.axes[1].patches
    assert bars[2].get_width() == pytest.approx(float(c.bias[1, 0, 1]))
    assert bars[3].get_width() == pytest.approx(float(c.value[1, 1]))
    frames = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len(frames) == 1  # the token that is read
    assert "layer 2" in c.plot(layer=2).axes[0].get_title(loc="left")
    c.positions[:] = -1
    assert c.plot(title="mine").axes[0].get_title(loc="left") == "mine"


def test_a_picture_of_an_encoder_and_a_decoder_adds_up():
    c = contributions(encoder=True)
    figure = c.plot(0, 1)
    bars = [bar.get_width() for bar in figure.axes[2].patches]
    assert sum(bars[:-1]) == pytest.approx(bars[-1])
    assert bars[-1] == pytest.approx(float(c.value[0, 1]))
    maps = [axes for axes in figure.axes if axes.images and axes.get_yticks().size]
    torch.testing.assert_close(image(maps[0]), c.encoder.scores[0, :, 1, 1:], rtol=1e-6, atol=0)
    later = c.plot(0, 1, layer=1)
    bars = [bar.get_width() for bar in later.axes[2].patches]
    assert sum(bars[:-1]) == pytest.approx(bars[-1])


def test_flow_of_one_layer():
    c = contributions()
    figure = c.plot_flow(1, 1, 1)
    torch.testing.assert_close(image(figure.axes[0]), c.flow[1, 1, 1, 2:, 2:], rtol=1e-6, atol=0)
    assert figure.axes[0].get_title().startswith("what passes in layer 1 on its way to “ target 1.1”")
    cross = contributions(encoder=True)
    figure = cross.plot_flow(0, 0, 1, cross=True)
    torch.testing.assert_close(image(figure.axes[0]), cross.cross_flow[0, 0, 1, 2:, 1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [None, 4])
def test_flow_by_head_is_added_up_with_what_tokens_keep(block):
    c = contributions(flow="heads", real=(6,))
    whole = c.flow[0, 2, 0].sum(0) + c.residual[0, 2, 0].diag()
    if block:
        maps = torch.stack(
            [c.flow[..., a : a + 4, :][..., b : b + 4].mean((-1, -2)) for a in (0, 4) for b in (0, 4)], -1
        )
        c.kept = DenseMaps({"flow": maps.unflatten(-1, (2, 2)).flatten(0, 1)}, block=block)
        whole = torch.stack([whole[a : a + 4, b : b + 4].mean() for a in (0, 4) for b in (0, 4)]).view(2, 2)
        heads = c.kept.maps["flow"][2, 0]
    else:
        heads = c.flow[0, 2, 0]
    torch.testing.assert_close(image(c.plot_flow(2).axes[0]), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(image(c.plot_flow(2, head=1).axes[0]), heads[1], rtol=1e-6, atol=1e-7)


def test_flow_that_is_not_there_says_so():
    with pytest.raises(ValueError, match="no flow was computed: ask ffattr"):
        contributions(flow=False).plot_flow()
    with pytest.raises(ValueError, match="of this model there is no flow from an encoder"):
        contributions().plot_flow(cross=True)
    with pytest.raises(ValueError, match="head=0: flow was not computed by head"):
        contributions().plot_flow(head=0)
    with pytest.raises(IndexError, match="head 2 does not exist: there are 2"):
        contributions(flow="heads").plot_flow(head=2)
    with pytest.raises(IndexError, match="layer 9 was not computed"):
        contributions().plot_flow(9)
    with pytest.raises(ValueError, match="no map of flow was kept"):
        replace(contributions(), kept=Kept()).plot_flow()
