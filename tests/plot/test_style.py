"""What all pictures share: text as it is shown, scales of colours, labels, checks."""

import itertools
import math

import pandas as pd
import pytest
import torch

from ffattr.plot.style import (
    GREY,
    LINES,
    ROWS,
    check_frame,
    check_map,
    find_colormap,
    find_ends,
    label_axis,
    label_ends,
    label_signed,
    label_step,
    largest_but,
    plain_text,
    scale_colours,
    short_text,
    to_array,
    to_cells,
    wrap_words,
)


def test_the_scale_is_blind_to_what_is_no_number():
    assert scale_colours(torch.tensor([torch.nan, 2.0]), "linear").vmax == 2.0
    assert scale_colours(torch.tensor([torch.nan]), "log").vmax == 1.0


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\t\r\n", "\\t\\r\\n"),
        ("a\x00\x1b", "a\\x00\\x1b"),
        ("\u200d\u202e", "\\u200d\\u202e"),
        ("\ud800", "\\ud800"),
        ("\u4f60\u597d", "\\u4f60\\u597d"),
        ("\U0001faa9", "\\U0001faa9"),
        ("na\u00efve \u043c\u0438\u0440", "na\u00efve \u043c\u0438\u0440"),
        ("  ", "\u2423\u2423"),
        ("\u0120", "\u2423"),
        ("", ""),
        ("_^{\\frac", "_^{\\frac"),
    ],
)
def test_every_character_is_visible(token, shown):
    assert plain_text(token) == shown


def test_fonts_of_the_user_are_asked():
    import matplotlib

    assert plain_text("\ua4d0") == "\ua4d0"  # Lisu, which DejaVu has
    with matplotlib.rc_context({"font.family": ["STIXGeneral"]}):
        assert plain_text("\ua4d0") == "\\ua4d0"
    with matplotlib.rc_context({"font.family": ["STIXGeneral", "DejaVu Sans"]}):
        assert plain_text("\ua4d0") == "\ua4d0"


def test_long_tokens_are_cut():
    assert short_text("a" * 28) == "a" * 28
    assert short_text("a" * 29) == "a" * 27 + "…"
    assert short_text("$$$$", 3) == r"\$\$…"


def test_names_are_thinned_out_where_there_are_too_many():
    assert [label_step("x" * tokens) for tokens in (0, 1, 60, 61, 120, 121)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_axis_names_its_tokens(axis):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert label_axis(axes, axis, [f"\u0120{place}" for place in range(130)], 7.0) == 3
    ticks = axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()
    assert [label.get_text() for label in ticks] == [str(place) for place in range(0, 130, 3)]
    assert {label.get_fontsize() for label in ticks} == {7.0}
    assert {label.get_rotation() for label in ticks} == {90.0 if axis == "x" else 0.0}


def test_the_largest_but_some():
    values = torch.tensor([[1.0, -5.0], [3.0, math.nan], [-math.inf, 2.0]])
    assert [largest_but(values, left_out) for left_out in range(5)] == [5.0, 3.0, 2.0, 1.0, 0.0]
    assert largest_but(torch.zeros(0), 0) == 0.0
    assert largest_but(torch.tensor([300.0], dtype=torch.bfloat16), 0) == 300.0


@pytest.mark.parametrize(("scale", "ends"), [("linear", (0, 4)), ("diverging", (-4, 4)), ("log", (1, 4))])
def test_colours_end_at_the_largest_value(scale, ends):
    found = scale_colours(torch.tensor([1.0, -4.0, 0.0]), scale)
    assert (found.vmin, found.vmax) == pytest.approx(ends)
    assert scale_colours(torch.tensor([1.0]), scale, top=8.0).vmax == 8.0
    assert scale_colours(torch.zeros(3), scale).vmax == 1.0
    assert scale_colours(torch.zeros(0), scale).vmax == 1.0


def test_a_logarithmic_scale_ends_where_few_entries_are_smaller_and_ten_thousand_times_below_the_largest():
    values = torch.logspace(-9, 0, 901, dtype=torch.float64)
    found = scale_colours(values, "log")
    assert (found.vmin, found.vmax) == pytest.approx((1e-4, 1.0))
    assert float(found(0.01)) == pytest.approx(0.5)
    near = scale_colours(torch.cat([values[-200:], torch.tensor([1e-3, 0.0])]), "log")
    assert float(near.vmin) == pytest.approx(float(values[-198]), rel=0.03)  # the second of two hundred
    assert scale_colours(torch.tensor([2.0]), "log").vmin == 1.0
    with pytest.raises(ValueError, match="scale='cubic', expected 'linear', 'log', 'diverging' or 'signed'"):
        scale_colours(torch.ones(1), "cubic")


def test_colour_maps_suit_the_scale_and_numbers_that_are_none_are_grey():
    from matplotlib.colors import to_rgba

    names = [find_colormap(None, scale).name for scale in ("linear", "log", "diverging")]
    assert names == ["sizes", "sizes", "signed"]
    less, more = (find_colormap(None, "diverging")(place) for place in (0.2, 0.8))
    assert less[0] > less[2]  # orange
    assert more[2] > more[0]  # blue
    found = find_colormap("PuOr", "linear")
    assert found.name == "PuOr"
    assert tuple(found.get_bad()) == to_rgba(GREY)
    with pytest.raises(ValueError, match="cmap='nope' is no colour map of matplotlib: try 'viridis'"):
        find_colormap("nope", "log")


def test_cells_without_a_number_are_masked_and_zeros_on_a_logarithmic_scale():
    values = torch.tensor([0.0, -1.0, 2.0, math.nan, math.inf])
    assert to_cells(values, "linear").mask.tolist() == [False, False, False, True, True]
    assert to_cells(values, "log").mask.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("values", "scale", "top", "ends"),
    [
        ([1.0, 2.0, 0.0], "linear", 2.0, "neither"),
        ([1.0, 3.0], "linear", 2.0, "max"),
        ([-3.0, 1.0], "diverging", 2.0, "min"),
        ([-3.0, 3.0], "diverging", 2.0, "both"),
        ([0.0, 1.0, 2.0], "log", 2.0, "neither"),
    ],
)
def test_arrows_say_that_values_lie_beyond_the_scale(values, scale, top, ends):
    given = torch.tensor(values)
    assert find_ends(given, scale_colours(given, scale, top)) == ends


def test_lines_and_rows_have_no_colour_that_says_more_or_less():
    from colorsys import rgb_to_hsv

    from matplotlib.colors import to_rgb

    for colour in (*LINES, *ROWS):
        hue, strength, value = rgb_to_hsv(*to_rgb(colour))
        blue, orange = 0.53 < hue < 0.7, 0.03 < hue < 0.13
        assert strength < 0.2 or value < 0.1 or not (blue or orange), colour


def test_words_are_broken_into_lines():
    assert wrap_words("attention block + FF + residual", 15) == "attention block\n+ FF + residual"


def test_a_small_bar_names_its_ends_and_middle():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    norm = scale_colours(torch.tensor([0.01, 1.0]), "log", top=1.0)
    bar = figure.colorbar(axes.imshow([[0.1]], norm=norm), ax=axes)
    label_ends(bar, norm)
    assert [label.get_text() for label in bar.ax.get_yticklabels()] == ["0.01", "0.1", "1"]


def test_values_for_matplotlib_have_single_precision_at_least():
    values = torch.tensor([[1.5, 2.0]], requires_grad=True)
    for dtype, kind in ((torch.bfloat16, "float32"), (torch.float32, "float32"), (torch.float64, "float64")):
        found = to_array(values.to(dtype))
        assert (found.dtype, found.tolist()) == (kind, [[1.5, 2.0]])


def test_maps_and_frames_that_cannot_be_drawn():
    check_map(torch.zeros(2, 3), "ab", "abc")
    with pytest.raises(ValueError, match=r"a sum of 2 x 3 needs as many query and key tokens, got 3 and 2"):
        check_map(torch.zeros(2, 3), "abc", "ab", "a sum")
    with pytest.raises(ValueError, match=r"a map has the shape \[queries, keys\], got \[1, 2, 3\]: pick one layer"):
        check_map(torch.zeros(1, 2, 3), "ab", "abc")
    frame = pd.DataFrame({"layer": [0], "value": [1.0]})
    check_frame(frame, ["value"], "a chart")
    with pytest.raises(
        ValueError, match="a chart needs the columns layer, share; the frame lacks share and has layer, "
    ):
        check_frame(frame, iter(["layer", "share"]), "a chart")
    with pytest.raises(ValueError, match="a chart needs the columns layer; the frame lacks layer and has none"):
        check_frame(pd.DataFrame(), ["layer"], "a chart")
    with pytest.raises(ValueError, match="a chart got a frame without rows"):
        check_frame(frame[:0], ["layer"], "a chart")


def test_a_bar_of_both_signs_names_zero_and_powers_of_ten_that_do_not_touch():
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 3))
    norm = scale_colours(torch.tensor([0.4, -0.2, 0.01]), "signed")
    bar = figure.colorbar(ScalarMappable(norm, find_colormap(None, "signed")), ax=figure.subplots())
    label_signed(bar, norm)
    assert [label.get_text() for label in bar.ax.get_yticklabels()] == ["\u22120.1", "0", "+0.1"]
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in bar.ax.get_yticklabels()]
    assert all(not first.overlaps(second) for first, second in itertools.pairwise(boxes))
