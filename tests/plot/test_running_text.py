"""Text laid out in lines."""

import pytest
from matplotlib.figure import Figure

from ffattr.plot.running_text import LINE, lay_out, write_text


def lines(pieces, width, below=None):
    laid = lay_out(pieces, below or [""] * len(pieces), width)
    found = [""] * laid.lines
    for line, text in zip(laid.line, laid.shown, strict=True):
        found[line] += f"|{text}"
    return found


def test_lines_break_before_words_and_at_line_ends():
    assert lines(["The", " cat", " sat", "."], 9.0) == ["|The|cat|sat|."]
    assert lines(["one", " two", "\n", "three"], 9.0) == ["|one|two|\\n", "|three"]
    narrow = lines([f" word{n}" if n % 2 else f" a{n}" for n in range(9)], 1.2)
    assert len(narrow) > 3
    assert lines([" aaaaaaa", "bbbb", " cccc", "dddd"], 1.3) == ["|aaaaaaa|bbbb", "|cccc|dddd"]  # no word is cut


def test_a_text_without_spaces_is_cut_where_the_line_ends():
    found = lines(["xxxxxxxx"] * 9, 2.0)
    assert len(found) > 2
    assert "".join(found) == "|xxxxxxxx" * 9


def test_nothing_overlaps_or_leaves_the_line():
    pieces = ["The", " quick", " br", "own", " fox", ",", " he", " said", "."] * 9
    laid = lay_out(pieces, ["+0.12"] * len(pieces), 5.0)
    for at in range(len(pieces)):
        assert laid.left[at] + laid.width[at] <= 5.0 + 1e-9
        if at and laid.line[at] == laid.line[at - 1]:
            assert laid.left[at] >= laid.left[at - 1] + laid.width[at - 1] - 1e-9
            assert laid.width[at] >= 5 * 0.06  # room for the number below


def test_space_and_nothing_are_seen():
    assert lines(["a", "  ", ""], 9.0) == ["|a|\u2423\u2423|\u00b7"]
    assert lay_out([], [], 9.0).lines == 1


def test_text_is_written_on_its_colours_in_ink_that_is_read():
    axes = Figure().add_subplot()
    laid = lay_out(["$a", " b"], ["+1", ""], 9.0)
    write_text(axes, laid, [(0.0, 0.1, 0.3), (1.0, 0.9, 0.9)], 1)
    assert [text.get_text() for text in axes.texts] == [r"\$a", "+1", "b"]
    assert [text.get_color() for text in axes.texts if text.get_text() != "+1"] == ["white", "black"]
    boxes = [patch for patch in axes.patches if patch.get_fill()]
    assert [box.get_facecolor()[:3] for box in boxes] == [(0.0, 0.1, 0.3), (1.0, 0.9, 0.9)]
    assert boxes[0].get_y() + boxes[0].get_height() / 2 == pytest.approx(-LINE / 2)
    (frame,) = (patch for patch in axes.patches if not patch.get_fill())
    assert frame.get_x() == boxes[1].get_x()
