import pandas as pd
import pytest

from ffattr.plot import cancellation_chart, category_bars, change_chart


def _change(layers=4, components=("LN", "FF", "FF block", "RES")):
    rows = [(layer, name, 0.1 * layer + 0.01 * i) for layer in range(layers) for i, name in enumerate(components)]
    return pd.DataFrame(rows, columns=["layer", "component", "value"])


def _legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def _nothing_overlaps(figure):
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.axison]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes += [text.get_window_extent() for text in (figure._suptitle, figure._supylabel)]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.height


def test_models_of_different_depth_have_layers_of_their_own():
    deep = pd.DataFrame({"model": "deep", "layer": range(30), "component": "FF", "value": 0.1})
    shallow = pd.DataFrame({"model": "shallow", "layer": range(3), "component": "FF", "value": 0.2})
    first, second = change_chart(pd.concat([deep, shallow])).axes
    assert first.get_xlim()[1] > 29
    assert second.get_xlim()[1] < 3
    assert first.get_ylim() == second.get_ylim()


def test_a_line_per_component_in_one_order():
    frame = _change().sample(frac=1, random_state=0)
    figure = change_chart(frame, "a title")
    (axes,) = figure.axes
    assert _legend(figure) == ["FF", "RES", "LN", "FF block"]
    assert axes.lines[0].get_xydata().tolist() == [[i, pytest.approx(0.1 * i + 0.01)] for i in range(4)]
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 4
    assert axes.get_xlabel() == "layer"
    assert "1 - " in figure.get_supylabel()
    assert figure.get_suptitle() == "a title"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert not axes.collections


@pytest.mark.parametrize(
    "extra", [{"standard_error": 0.02}, {"low": lambda f: f.value - 0.02, "high": lambda f: f.value + 0.02}]
)
def test_bands_of_uncertainty(extra):
    axes = change_chart(_change().assign(**extra)).axes[0]
    band = axes.collections[0].get_paths()[0].vertices
    at_three = band[band[:, 0] == 3.0][:, 1]
    assert (at_three.min(), at_three.max()) == (pytest.approx(0.29), pytest.approx(0.33))


@pytest.mark.parametrize("models", [1, 3, 6])
def test_a_panel_per_model_on_one_scale(models):
    frames = [_change().assign(model=f"m{i}", value=lambda f, i=i: f.value * (i + 1)) for i in range(models)]
    figure = change_chart(pd.concat(frames))
    assert [axes.get_title() for axes in figure.axes] == [f"m{i}" for i in range(models)]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[-1].lines[0].get_ydata()[1] == pytest.approx(0.11 * models)
    _nothing_overlaps(figure)


def test_wrong_frames_are_named():
    with pytest.raises(ValueError, match="lacks value and has layer, component"):
        change_chart(_change()[["layer", "component"]])
    with pytest.raises(ValueError, match="without rows"):
        change_chart(_change().iloc[:0])
    with pytest.raises(ValueError, match="layer 0 has several values of LN"):
        change_chart(pd.concat([_change(), _change()]))
    with pytest.raises(ValueError, match="columns=0"):
        change_chart(_change(), columns=0)
    with pytest.raises(ValueError, match=r"category_bars needs .* lacks layer"):
        category_bars(_categories().drop(columns="layer"), by_layer=True)


def _categories():
    rows = [(layer, kind, 0.1 * (i + 1) + 0.02 * layer, 0.05) for layer in (2, 4) for i, kind in enumerate("zyx")]
    return pd.DataFrame(rows, columns=["layer", "category", "share", "base_rate"])


def test_bars_are_means_over_layers_beside_the_base_rate():
    figure = category_bars(_categories())
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z", "y", "x"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.16, 0.26, 0.36, 0.05, 0.05, 0.05])
    assert [text.get_text() for text in axes.texts] == [
        "3.2 times as often as among all pairs",
        "5.2 times",
        "7.2 times",
    ]
    assert _legend(figure) == ["among amplified pairs", "among all pairs"]
    assert axes.yaxis_inverted()
    _nothing_overlaps(figure)


def test_a_category_that_never_occurs_has_no_ratio():
    frame = pd.DataFrame({"category": ["a", "b"], "share": [0.1, float("nan")], "base_rate": [0.0, 0.2]})
    assert not category_bars(frame).axes[0].texts


def test_categories_over_the_layers():
    figure = category_bars(_categories(), by_layer=True)
    assert [axes.get_title() for axes in figure.axes] == ["z", "y", "x"]
    share, base = figure.axes[1].lines
    assert share.get_xydata().tolist() == [[2, pytest.approx(0.24)], [4, pytest.approx(0.28)]]
    assert list(base.get_ydata()) == [0.05, 0.05]
    assert figure.axes[0].get_ylim()[0] == 0.0
    _nothing_overlaps(figure)


def _cancelled(orders):
    rows = [
        (layer, name, order, removed, 1.0 / (1 + removed) + layer + i)
        for layer in (0, 1, 2)
        for name in ("FF", "LN")
        for i, order in enumerate(orders)
        for removed in (100, 0, 1, 10)
    ]
    return pd.DataFrame(rows, columns=["layer", "component", "order", "removed", "value"])


def test_a_line_per_layer_where_there_is_one_order():
    figure = cancellation_chart(_cancelled(["random"]))
    ff, ln, bar = figure.axes
    assert (ff.get_title(), ln.get_title(), bar.get_ylabel()) == ("FF", "LN", "layer")
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "1", "2"]
    assert list(ff.lines[1].get_xdata()) == [0, 1, 10, 100]
    assert ff.lines[1].get_ydata()[0] == 2.0
    lightness = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue, _ in (one.get_color() for one in ff.lines)]
    assert lightness == sorted(lightness)
    assert ff.get_xscale() == "symlog"
    assert [label.get_text() for label in ff.get_xticklabels()] == ["0", "1", "10", "100"]
    assert ff.get_xlabel() == "removed dimensions, at random"
    assert ff.get_ylim() == ln.get_ylim()
    _nothing_overlaps(figure)


def test_a_line_per_order_is_the_mean_over_the_layers():
    figure = cancellation_chart(_cancelled(["random", "largest"]))
    assert len(figure.axes) == 2
    assert _legend(figure) == ["at random", "largest"]
    assert figure.axes[1].lines[1].get_xydata().tolist()[:2] == [[0, 3.0], [1, 2.5]]
    _nothing_overlaps(figure)
