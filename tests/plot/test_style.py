"""What all pictures share: text as it is shown, scales of colours, labels, checks."""

import math

import pandas as pd
import pytest
import torch

from ffattr.plot.style import (
    GREY,
    check_frame,
    check_map,
    find_colormap,
    label_axis,
    label_step,
    largest_but,
    plain_text,
    scale_colours,
    short_text,
    to_array,
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


@pytest.mark.parametrize(("scale", "ends"), [("linear", (0, 4)), ("diverging", (-4, 4)), ("log", (0.004, 4))])
def test_colours_end_at_the_largest_value(scale, ends):
    found = scale_colours(torch.tensor([1.0, -4.0, 0.0]), scale)
    assert (found.vmin, found.vmax) == pytest.approx(ends)
    assert scale_colours(torch.tensor([1.0]), scale, top=8.0).vmax == 8.0
    assert scale_colours(torch.zeros(3), scale).vmax == 1.0
    assert scale_colours(torch.zeros(0), scale).vmax == 1.0


def test_a_logarithmic_scale_has_the_lowest_colour_for_zeros():
    found = scale_colours(torch.tensor([2.0]), "log")
    assert [float(found(value)) for value in (0.0, 1e-9, 2.0, 5.0)] == [0.0, 0.0, 1.0, 1.0]
    assert float(found(2 / 1000**0.5)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="scale='cubic', expected 'linear', 'log', 'diverging' or 'signed'"):
        scale_colours(torch.ones(1), "cubic")


def test_colour_maps_suit_the_scale_and_numbers_that_are_none_are_grey():
    from matplotlib.colors import to_rgba

    names = [find_colormap(None, scale).name for scale in ("linear", "log", "diverging")]
    assert names == ["viridis", "viridis", "RdBu_r"]
    found = find_colormap("PuOr", "linear")
    assert found.name == "PuOr"
    assert tuple(found.get_bad()) == to_rgba(GREY)
    with pytest.raises(ValueError, match="cmap='nope' is no colour map of matplotlib: try 'viridis'"):
        find_colormap("nope", "log")


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
