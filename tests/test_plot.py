import io
import sys
from itertools import pairwise

import pytest
import torch

from ffattr.plot import layer_grid, map_figure


def _labels(axes, axis):
    ticks = axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()
    return [label.get_text() for label in ticks]


def test_a_map_shows_every_token_and_names_its_axes():
    values = torch.rand(3, 20)
    figure = map_figure(values, list("abc"), [f"w{t}" for t in range(20)], "a title")
    axes, bar = figure.axes
    assert _labels(axes, "x") == [f"w{t}" for t in range(20)]
    assert _labels(axes, "y") == list("abc")
    assert axes.get_xlabel() == "key token $j$"
    assert axes.get_ylabel() == "query token $i$"
    assert axes.get_title() == "a title"
    assert "norm" in bar.get_ylabel()
    assert axes.images[0].get_cmap().name == "viridis"
    assert torch.equal(torch.as_tensor(axes.images[0].get_array()), values)


def test_labels_of_twenty_tokens_do_not_overlap():
    figure = map_figure(torch.rand(20, 20), ["queries"] * 20, ["keys"] * 20)
    figure.savefig(io.BytesIO())
    for axis in ("xaxis", "yaxis"):
        boxes = [label.get_window_extent() for label in getattr(figure.axes[0], axis).get_ticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize(("tokens", "labels"), [(60, 60), (61, 31), (500, 56)])
def test_many_labels_are_thinned(tokens, labels):
    names = [str(t) for t in range(tokens)]
    axes = map_figure(torch.rand(tokens, tokens), names, names).axes[0]
    assert len(_labels(axes, "x")) == len(_labels(axes, "y")) == labels


def test_tokens_are_shown_as_text():
    tokens = ["\u0120the", "\u2581of", "$x$", "\n", "\u010a"]
    figure = map_figure(torch.rand(5, 5), tokens, tokens, "costs $5 or $6")
    assert _labels(figure.axes[0], "x") == ["the", "of", r"\$x\$", "\\n", "\\n"]
    figure.savefig(io.BytesIO())  # mathematics in a token would raise here


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(
    "values", [torch.zeros(2, 3), torch.rand(2, 3).bfloat16(), torch.rand(1, 1), torch.rand(1, 300)]
)
def test_any_map_can_be_drawn(values, scale):
    rows, columns = values.shape
    map_figure(values, ["q"] * rows, ["k"] * columns, scale=scale).savefig(io.BytesIO())
    layer_grid(values[None], [3], scale=scale).savefig(io.BytesIO())


def test_a_grid_has_one_map_per_layer():
    figure = layer_grid(torch.rand(8, 5, 5), range(2, 10), "a title", columns=3)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == [f"layer {layer}" for layer in range(2, 10)]
    assert "norm" in figure.get_suptitle()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"a map of 2 x 3 .* got 3 and 2"):
        map_figure(torch.rand(2, 3), list("abc"), list("ab"))
    with pytest.raises(ValueError, match="of 2 layers, got shape"):
        layer_grid(torch.rand(3, 2, 2), [0, 1])
    with pytest.raises(ValueError, match="scale='square'"):
        map_figure(torch.rand(1, 1), ["a"], ["b"], scale="square")


def test_pyplot_is_not_touched():
    map_figure(torch.rand(1, 1), ["a"], ["b"])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_one_huge_entry_leaves_colours_to_the_others():
    values = torch.rand(64, 64) + 1
    values[0, 0] = 1e6
    figure = map_figure(values, ["q"] * 64, ["k"] * 64, scale="log")
    norm = figure.axes[0].images[0].norm
    assert values[1:].max() * 0.99 < norm.vmax <= values[1:].max() * 1.01
    assert map_figure(values, ["q"] * 64, ["k"] * 64).axes[0].images[0].norm.vmax == 1e6
