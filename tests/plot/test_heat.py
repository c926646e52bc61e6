import io
import sys
import warnings
from itertools import pairwise

import pandas as pd
import pytest
import torch

from ffattr import plot
from ffattr.plot import layer_grid, map_figure
from ffattr.plot.style import GREY


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
    assert axes.images[0].get_cmap().name == "sizes"
    assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), values)


def _ends(figure):
    """Which ends of the colour bar have arrows."""
    return figure.axes[0].images[0].colorbar.extend


def test_by_default_a_strong_diagonal_leaves_colours_to_the_rest_and_the_bar_says_where_it_ends():
    values = torch.linspace(1e-3, 1e-2, 400).view(20, 20) + 100 * torch.eye(20)
    values[0, 1], values[5, 2] = 1e-9, 0.0
    figure = map_figure(values, ["q"] * 20, ["k"] * 20)
    image = figure.axes[0].images[0]
    assert 1e-4 < float(image.norm.vmin) < 2e-2
    places = image.norm(image.get_array()).filled(0)
    assert places[~torch.eye(20, dtype=torch.bool).numpy()].max() < 0.5 < places.diagonal().min()
    assert _ends(figure) == "min"
    assert image.get_array().mask.nonzero() == ([5], [2])  # zero is grey, what is small is not
    assert figure.axes[1].get_ylabel().endswith("; grey: none")


def test_small_maps_of_heads_are_called_so():
    figure = layer_grid(torch.rand(3, 4, 4), range(3), kind="head", measure="L1 norm")
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["head 0", "head 1", "head 2"]
    assert figure.get_suptitle() == "colour: L1 norm"


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


def test_labels_of_two_hundred_tokens_are_large_enough_and_say_that_some_are_missing():
    names = [f"token{t}" for t in range(200)]
    figure = map_figure(torch.rand(200, 200), names, names)
    axes = figure.axes[0]
    assert _labels(axes, "x")[:3] == ["token0", "token4", "token8"]
    assert axes.get_xlabel() == "key token $j$ (one in 4 named)"
    assert axes.get_ylabel() == "query token $i$ (one in 4 named)"
    assert all(label.get_fontsize() >= 8 for label in axes.get_xticklabels() + axes.get_yticklabels())
    figure.draw_without_rendering()
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


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
    tokens, change = ["a", "b"], {"layer": [0], "component": ["FF"], "value": [0.1]}
    map_figure(torch.rand(1, 1), ["a"], ["b"])
    plot.scope_strip({"atb": torch.rand(2, 2)}, tokens, tokens)
    plot.amp_strip(torch.rand(1, 2, 2), [0], tokens, tokens)
    plot.arcs(torch.rand(2), tokens, 0)
    plot.change_chart(pd.DataFrame(change))
    plot.cancellation_chart(pd.DataFrame({**change, "order": "random", "removed": 0}))
    plot.category_bars(pd.DataFrame({"category": ["same"], "share": [0.1], "base_rate": [0.2]}))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_one_huge_entry_leaves_colours_to_the_others():
    values = torch.rand(64, 64) + 1
    values[0, 0] = 1e6
    figure = map_figure(values, ["q"] * 64, ["k"] * 64, scale="log")
    norm = figure.axes[0].images[0].norm
    assert values[1:].max() * 0.99 < norm.vmax <= values[1:].max() * 1.01
    assert _ends(figure) == "max"
    linear = map_figure(values, ["q"] * 64, ["k"] * 64, scale="linear")
    assert linear.axes[0].images[0].norm.vmax == 1e6
    assert _ends(linear) == "neither"


def test_differences_are_centred_at_zero():
    values = torch.tensor([[0.1, -0.4], [0.2, 0.0]])
    axes, bar = map_figure(values, ["a", "b"], ["c", "d"], scale="diverging", colour_label="share of $x").axes
    norm = axes.images[0].norm
    assert (norm(0.0), norm.vmax) == (0.5, pytest.approx(0.4))
    middle = axes.images[0].get_cmap()(0.5)
    assert max(middle[:3]) - min(middle[:3]) < 0.03  # no hue
    assert bar.get_ylabel() == r"share of \$x"
    assert (
        map_figure(values, ["a", "b"], ["c", "d"], scale="diverging", cmap="PuOr").axes[0].images[0].cmap.name == "PuOr"
    )


def test_cells_without_a_number_are_grey():
    from matplotlib.colors import to_rgba

    values = torch.tensor([[0.5, torch.nan], [torch.inf, 1.0]])
    for scale in ("linear", "log", "diverging"):
        image = map_figure(values, ["a", "b"], ["c", "d"], scale=scale).axes[0].images[0]
        assert image.norm.vmax == 1.0
        shown = image.to_rgba(image.get_array())
        assert tuple(shown[0, 1]) == tuple(shown[1, 0]) == to_rgba(GREY)
        assert tuple(shown[0, 0]) != to_rgba(GREY)


def test_a_wrong_colour_map_is_named():
    with pytest.raises(ValueError, match="cmap='nope'"):
        map_figure(torch.rand(1, 1), ["a"], ["b"], cmap="nope")
    with pytest.raises(ValueError, match=r"\[queries, keys\], got \[1, 1, 1\]"):
        map_figure(torch.rand(1, 1, 1), ["a"], ["b"])
    with pytest.raises(ValueError, match="got shape"):
        layer_grid(torch.rand(0, 2, 2), [])


def test_tokens_without_glyphs_are_drawn_without_a_warning():
    tokens = ["\u4f60\u597d", "\U0001faa9", "\x07", "$a_", "\ud800"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            map_figure(torch.rand(5, 5), tokens, tokens, tokens[0]),
            plot.scope_strip({"atb": torch.rand(5, 5)}, tokens, tokens, tokens[1]),
            plot.amp_strip(torch.rand(1, 5, 5), [0], tokens, tokens),
            plot.arcs(torch.rand(5), tokens, 1, tokens[0]),
        ):
            for kind in ("png", "svg"):
                figure.savefig(io.BytesIO(), format=kind)
