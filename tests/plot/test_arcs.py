from itertools import combinations

import pytest
import torch
from matplotlib.patches import PathPatch

from ffattr.plot import arcs

TEXT = "Call me Ishmael . Some years ago never mind how long precisely having little or no money in my purse"
WORDS = TEXT.split()


def _row(tokens, seed=0):
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) + 0.01


def _drawn(figure):
    return [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]


def _labels(figure, tokens):
    return {text.get_text(): text for text in figure.axes[0].texts if text.get_text() in tokens}


def test_width_and_opacity_tell_the_share():
    tokens = list("abcde")
    figure = arcs(torch.tensor([4.0, 1.0, 2.0, 0.0, torch.nan]), tokens, 1, "a title")
    axes, (two, four) = figure.axes[0], _drawn(figure)  # the weakest first, below the others
    assert four.get_linewidth() == 2 * two.get_linewidth()
    assert four.get_alpha() > two.get_alpha()
    places = {name: text.get_position()[0] for name, text in _labels(figure, tokens).items()}
    assert [patch.get_path().vertices[[0, -1], 0].tolist() for patch in (two, four)] == [
        [places["b"], places["c"]],
        [places["b"], places["a"]],
    ]
    assert axes.get_title() == "a title"
    assert axes.get_xlabel() == "key token $j$ of query token $i$, b"
    assert "own token 14 %" in [text.get_text() for text in axes.texts]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [line.get_linewidth() for line in figure.legends[0].get_lines()][:2] == [7.0, 3.5]
    assert (four.get_linewidth(), two.get_linewidth()) == (7.0, 3.5)
    assert legend == ["57 % of the row", "29 % of the row", "11 % of the row"]


def test_the_disc_is_as_large_as_the_own_share():
    large = arcs(torch.tensor([1.0, 3.0]), ["a", "b"], 1).axes[0].collections[0]
    small = arcs(torch.tensor([3.0, 1.0]), ["a", "b"], 1).axes[0].collections[0]
    assert large.get_sizes()[0] == pytest.approx(3 * small.get_sizes()[0])


def test_a_disc_does_not_cover_its_token():
    figure = arcs(torch.tensor([0.01, 3.0]), ["a", "b"], 1, other=torch.tensor([0.01, 3.0]))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    label = _labels(figure, ["b"])["b"].get_window_extent()
    assert len(axes.collections) == 2
    for disc in axes.collections:
        height = axes.transData.transform(disc.get_offsets())[0, 1]
        radius = disc.get_sizes()[0] ** 0.5 / 2 * figure.dpi / 72
        assert abs(height - (label.y0 + label.y1) / 2) > radius + label.height / 2


def test_a_second_row_is_drawn_below_in_the_same_measure():
    a, b = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 6.0])
    figure = arcs(a, list("abc"), 0, other=b, names=("with", "without"))
    upper, lower = _drawn(figure)[:2], _drawn(figure)[2:]
    assert all(patch.get_path().vertices[:, 1].min() >= 0 for patch in upper)
    assert all(patch.get_path().vertices[:, 1].max() < 0 for patch in lower)
    assert lower[1].get_linewidth() == pytest.approx(1.5 * upper[1].get_linewidth())
    assert upper[0].get_edgecolor()[:3] != lower[0].get_edgecolor()[:3]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"with · own token 25 %", "without · own token 12 %"} <= set(texts)


def test_a_query_that_is_no_key_stands_above():
    figure = arcs(_row(4), list("abcd"), None, query_token="Schiff")
    (label,) = _labels(figure, ["Schiff"]).values()
    starts = {tuple(patch.get_path().vertices[0]) for patch in _drawn(figure)}
    assert len(_drawn(figure)) == 4
    assert {x for x, _ in starts} == {label.get_position()[0]}
    assert label.get_position()[1] > max(y for _, y in starts) > 0
    assert not figure.axes[0].collections
    assert figure.axes[0].get_xlabel() == "key token $j$"


def test_only_the_strongest_are_drawn_and_their_ends_named():
    tokens, row = [f"{WORDS[t % 20]}{t}" for t in range(200)], _row(200)
    figure = arcs(row, tokens, 90, limit=10)
    assert len(_drawn(figure)) == 10
    strongest = [t for t in row.argsort(descending=True).tolist() if t != 90][:10]
    assert set(_labels(figure, tokens)) == {tokens[t] for t in [*strongest, 90]}
    said = next(text.get_text() for text in figure.axes[0].texts if "own token" in text.get_text())
    assert "10 strongest keys" in said
    assert "189 more not drawn" in said


@pytest.mark.parametrize("count", [6, 20, 45, 200])
@pytest.mark.parametrize(("both", "query_token"), [(False, None), (True, None), (True, "Schiff")])
def test_no_text_overlaps_and_none_is_clipped(count, both, query_token):
    tokens = [WORDS[t % len(WORDS)] for t in range(count)]
    row = _row(count)
    row[count // 3 : count // 3 + 12] += 3  # crowded ends
    row[-4:] += 3
    names = ("after", "before") if both else None
    options = {"other": _row(count, 1) if both else None, "names": names, "query_token": query_token}
    figure = arcs(row, tokens, count // 2, "title", **options)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    parts = [*axes.texts, axes.title, axes.xaxis.label, figure.legends[0]]
    boxes = [part.get_window_extent() for part in parts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([1.0, 2.0], {}, ValueError, r"\[3\] as there are tokens, got \[2\]"),
        ([[1.0, 2.0, 3.0]], {}, ValueError, r"got \[1, 3\]"),
        ([1.0, -2.0, 3.0], {}, ValueError, "down to -2"),
        ([0.0, 0.0, 0.0], {}, ValueError, "nothing but zeros"),
        ([1.0, 2.0, 3.0], {"query": 3}, IndexError, "query 3 is none of the 3 tokens"),
        ([1.0, 2.0, 3.0], {"query": None}, IndexError, "query None"),
        ([1.0, 2.0, 3.0], {"limit": 0}, ValueError, "limit=0"),
        ([1.0, 2.0, 3.0], {"names": ("a", "b")}, ValueError, r"\['a', 'b'\], expected one for each of the 1"),
    ],
)
def test_wrong_arguments_are_named(values, options, error, message):
    with pytest.raises(error, match=message):
        arcs(torch.tensor(values), list("abc"), **{"query": 0, **options})
