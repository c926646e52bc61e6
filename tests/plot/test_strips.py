from itertools import pairwise

import pytest
import torch

from ffattr.plot import amp_strip, scope_strip

POST = ["attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"]
PRE = ["attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"]
TOKENS = ["[CLS]", "dogs", "bark", "loudly", ".", "[SEP]"]


def _maps(scopes, tokens=6):
    return {
        scope: torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(i)) for i, scope in enumerate(scopes)
    }


def _heat(figure):
    return [axes for axes in figure.axes if axes.images]


def _arrows(figure):
    return [[text.get_text() for text in axes.texts] for axes in _heat(figure)]


@pytest.mark.parametrize(
    ("scopes", "passed"),
    [
        (POST, [[], ["RES"], ["LN"], ["FF"], ["RES"], ["LN"]]),
        (PRE, [[], ["RES"], ["LN"], ["FF"], ["RES"]]),
        (["cross.atb", "cross.atb_ff"], [[], ["FF"]]),
        (["atb", "atb_ff_res_ln"], [[], ["FF + RES + LN"]]),
        (["attn", "atb"], [[], ["ATB"]]),
        (["atb", "cross.atb_ff", "mine"], [[], [], []]),
    ],
)
def test_arrows_name_the_component_between_two_scopes(scopes, passed):
    figure = scope_strip(_maps(scopes), TOKENS, TOKENS)
    assert [axes.get_title().split("\n")[0] for axes in _heat(figure)] == scopes
    assert _arrows(figure) == passed


def test_scopes_are_there_in_words():
    titles = [axes.get_title() for axes in _heat(scope_strip(_maps(["atb", "atb_ff_res", "mine"]), TOKENS, TOKENS))]
    assert titles == ["atb\nattention block", "atb_ff_res\nattention block + FF +\nresidual", "mine"]


def test_rows_are_shares_on_one_scale():
    maps = _maps(POST)
    maps["atb"][2] = 0
    maps["attn"][1, 3] = torch.nan
    figure = scope_strip(maps, TOKENS, TOKENS, "a title")
    images = [axes.images[0] for axes in _heat(figure)]
    shown = torch.as_tensor(images[1].get_array().data)
    assert torch.allclose(shown, maps["attn_res"] / maps["attn_res"].sum(-1, keepdim=True))
    assert torch.allclose(torch.as_tensor(images[0].get_array().filled(0)).sum(-1), torch.ones(6))
    assert torch.as_tensor(images[2].get_array().data)[2].tolist() == [0.0] * 6
    assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 1
    bars = [axes for axes in figure.axes if not axes.images and axes.get_ylabel()]
    assert [bar.get_ylabel() for bar in bars] == ["share of the row"]
    assert figure.get_suptitle() == "a title"


def test_maps_as_they_are_have_their_own_colours():
    maps = {"atb": torch.rand(3, 3), "atb_ff": torch.rand(3, 3) * 100}
    figure = scope_strip(maps, "abc", "abc", normalize=False)
    images = [axes.images[0] for axes in figure.axes if axes.get_title()]
    for image, values in zip(images, maps.values(), strict=True):
        assert torch.equal(torch.as_tensor(image.get_array().data), values)
        assert image.norm.vmax == pytest.approx(float(values.max()))
    assert "own colours" in figure.get_suptitle()


def test_only_the_first_map_names_few_tokens():
    first, *others = _heat(scope_strip(_maps(POST), TOKENS, TOKENS))
    assert [label.get_text() for label in first.get_yticklabels()] == TOKENS
    assert not any(axes.get_xticklabels() or axes.get_yticklabels() for axes in others)
    names = [str(t) for t in range(200)]
    first = _heat(scope_strip(_maps(["atb"], 200), names, names))[0]
    assert not first.get_xticklabels()
    assert (first.get_xlabel(), first.get_ylabel()) == ("key token $j$", "query token $i$")


@pytest.mark.parametrize(("tokens", "normalize"), [(6, True), (20, False), (200, True)])
def test_maps_arrows_and_bars_do_not_overlap_and_nothing_is_clipped(tokens, normalize):
    names = ["unbelievable"] * tokens
    figure = scope_strip(_maps(POST, tokens), names, names, normalize=normalize)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible() and axes.axison]
    for place, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


def test_a_strip_goes_on_in_the_next_line():
    figure = scope_strip(_maps(POST), TOKENS, TOKENS, columns=4)
    places = [axes.get_subplotspec() for axes in _heat(figure)]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, i) for i in range(4)] + [
        (1, 0),
        (1, 1),
    ]
    assert scope_strip(_maps(POST), TOKENS, TOKENS).axes[0].get_subplotspec().get_gridspec().ncols == 6


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({}, "no maps"),
        ({"attn_heads": torch.rand(2, 6, 6)}, r"map of attn_heads .* got \[2, 6, 6\]"),
        ({"atb": torch.rand(6, 5)}, "map of atb of 6 x 5 .* got 6 and 6"),
        ({"atb": -torch.rand(6, 6)}, "atb has negative entries.*normalize=False"),
    ],
)
def test_wrong_maps_are_named(maps, message):
    with pytest.raises(ValueError, match=message):
        scope_strip(maps, TOKENS, TOKENS)
    with pytest.raises(ValueError, match="columns=0"):
        scope_strip(_maps(POST), TOKENS, TOKENS, columns=0)


def _amp(tokens=6, layers=3):
    return 0.1 * torch.randn(layers, tokens, tokens, generator=torch.Generator().manual_seed(0))


def test_the_strongest_pairs_are_marked_and_named():
    values = _amp()
    values[1, 4, 2], values[1, 0, 5], values[1, 3, 3] = 3.0, 2.0, torch.nan
    values[2] = -values[2].abs()
    axes = _heat(amp_strip(values, [3, 5, 7], TOKENS, TOKENS, mark=2))
    assert [one.get_title() for one in axes] == ["layer 3", "layer 5", "layer 7"]
    assert axes[1].get_xlabel() == "○ . ← bark\n□ [CLS] ← [SEP]"
    assert [line.get_xydata().tolist() for line in axes[1].lines] == [[[2.0, 4.0]], [[5.0, 0.0]]]
    assert axes[2].get_xlabel() == ""
    assert not axes[2].lines
    assert not _heat(amp_strip(values, [3, 5, 7], TOKENS, TOKENS, mark=0))[1].lines


def test_layers_share_a_scale_around_zero_that_an_outlier_does_not_take():
    values = _amp()
    values[0, 0, 0] = -50.0
    images = [axes.images[0] for axes in _heat(amp_strip(values, [0, 1, 2], TOKENS, TOKENS))]
    usual = float(values[1:].abs().max())
    for image in images:
        assert image.norm(0.0) == 0.5
        assert usual * 0.99 <= image.norm.vmax < usual * 2
        assert image.norm is images[0].norm


def test_few_tokens_are_named_at_the_edges_of_what_is_amplified():
    axes = _heat(amp_strip(_amp(), [0, 1, 2], TOKENS, TOKENS, columns=2))
    named = [(bool(one.get_xticklabels()), bool(one.get_yticklabels())) for one in axes]
    assert named == [(False, True), (True, False), (True, True)]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == TOKENS
    names = [str(t) for t in range(60)]
    assert not _heat(amp_strip(_amp(60), [0, 1, 2], names, names))[0].get_yticklabels()


def test_cells_that_no_query_sees_are_grey():
    values = _amp()
    values[:, 0, 1:] = torch.nan
    images = [axes.images[0] for axes in _heat(amp_strip(values, [0, 1, 2], TOKENS, TOKENS))]
    assert all(image.get_array().mask[0].tolist() == [False] + [True] * 5 for image in images)


def test_names_below_maps_do_not_overlap():
    tokens = ["unbelievably-long-token"] * 20
    figure = amp_strip(_amp(20, 12), range(12), tokens, tokens)
    figure.draw_without_rendering()
    boxes = [axes.xaxis.label.get_window_extent() for axes in _heat(figure)]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_wrong_arguments_of_amp_strip_are_named():
    with pytest.raises(ValueError, match="of 2 layers, got"):
        amp_strip(_amp(), [0, 1], TOKENS, TOKENS)
    with pytest.raises(ValueError, match="mark=9, expected 0 to 5"):
        amp_strip(_amp(), [0, 1, 2], TOKENS, TOKENS, mark=9)
    with pytest.raises(ValueError, match=r"FF-amp map of 6 x 6 .* got 5 and 6"):
        amp_strip(_amp(), [0, 1, 2], TOKENS[1:], TOKENS)


def test_pairs_that_are_not_to_be_marked():
    values = torch.tensor([[[0.9, 0.1], [-0.2, 0.8]]])
    names = amp_strip(values, [0], ["a", "b"], ["c", "d"], unmarked=torch.eye(2).bool()).axes[0].get_xlabel()
    assert "a ← d" in names
    assert "a ← c" not in names
    assert "b ← d" not in names
    with pytest.raises(ValueError, match=r"unmarked has shape \[3, 2\], expected that of a map: \[2, 2\]"):
        amp_strip(values, [0], ["a", "b"], ["c", "d"], unmarked=torch.ones(3, 2).bool())
