"""Plots of whole maps and of what was kept."""

import pytest
import torch
from keeping import kept, some
from synthetic import attribution

from ffattr import Pool, TopK
from ffattr.results.figures import save_figure


def test_plot_leaves_padding_out_and_names_what_it_shows():
    attr = attribution(queries=(1, 3, 5))
    axes = attr.plot("atb", layer=2, batch=1).axes[0]
    assert axes.get_title() == "attention block (atb), layer 2"
    assert [label.get_text() for label in axes.get_xticklabels()] == attr.tokens[1][:4]
    assert [label.get_text() for label in axes.get_yticklabels()] == [attr.tokens[1][1], attr.tokens[1][3]]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    assert torch.equal(shown, attr.maps["atb"][1, 1][:2, :4])
    assert attr.plot("attn_heads", head=1).axes[0].get_title() == "attention, by head (attn_heads), layer 5, head 1"


def test_without_a_head_all_of_them_are_drawn():
    figure = attribution().plot("attn_heads")
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["head 0", "head 1"]
    assert figure.get_suptitle() == "attention, by head (attn_heads), layer 5 (colour: norm)"


def test_what_a_causal_model_cannot_see_is_grey():
    attr = attribution(queries=(1, 3, 5))
    attr.arguments["causal"] = True
    hidden = [[key > query for key in range(6)] for query in (1, 3, 5)]
    for scale in ("log", "linear"):
        assert attr.plot("atb", scale=scale).axes[0].images[0].get_array().mask.tolist() == hidden


def test_arcs_of_a_word():
    attr = attribution()
    token = attr.tokens[0][3]
    title = attr.plot_arcs(3, "atb").axes[0].get_title()
    assert attr.plot_arcs(token, "atb").axes[0].get_title() == title
    with pytest.raises(ValueError, match="query='nowhere', expected the position of a token or a word of the text"):
        attr.plot_arcs("nowhere")
    attr.tokens[0][4] = token
    with pytest.raises(ValueError, match=r"several, at \[3, 4\]: name a position"):
        attr.plot_arcs(token)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": 1}, IndexError, "layer 1 was not computed; computed: 0, 2, 5"),
        ({"layer": -4}, IndexError, "layer -4"),
        ({"batch": 2}, IndexError, "there are 2 sequences"),
        ({"scope": "attn_heads", "head": 2}, ValueError, "got head=2"),
        ({"head": 0}, ValueError, "summed over heads"),
        ({"scope": "nope"}, KeyError, "no scope 'nope'"),
    ],
)
def test_plot_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        attribution().plot(**arguments)


def test_plots_of_what_was_kept():
    attr = some(queries=(5, 0, 2, 4))
    whole = attr.plot("atb", 2, 1).axes[0]
    top = kept(TopK(1), attr).plot("atb", 2, 1).axes[0]
    for ticks in ("get_xticklabels", "get_yticklabels"):
        assert [one.get_text() for one in getattr(top, ticks)()] == [one.get_text() for one in getattr(whole, ticks)()]
    shown = torch.as_tensor(top.images[0].get_array())
    maps = attr.maps["atb"][1, 1][[2, 3]][:, [2, 3, 4]]
    assert torch.equal(shown.amax(1), maps.amax(1))
    assert ((shown > 0).sum(1) == 1).all()
    assert torch.equal(torch.as_tensor(kept(TopK(9), attr).plot("atb", 2, -1).axes[0].images[0].get_array()), maps)
    pooled = kept(Pool(2), attr)
    axes = pooled.plot("attn_heads", 2, 1, head=1).axes[0]
    assert [one.get_text() for one in axes.get_xticklabels()] == ["tok1.2 … tok1.3", "tok1.4"]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["tok1.2 … tok1.4"]
    assert torch.equal(torch.as_tensor(axes.images[0].get_array()), pooled.maps["attn_heads"][1, 1, 1][1:, 1:3])


def test_a_figure_is_saved_by_the_suffix_of_its_file(tmp_path):
    figure = attribution().plot(layer=0)
    for name, begins in (("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml")):
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.PDF", "a.png", "a.svg"]


def test_bertviz_takes_what_is_made_for_it():
    attr = attribution()
    for scope, heads in (("attn_heads", 2), ("atb", 1)):
        given = attr.to_bertviz(scope, batch=1)
        assert given["tokens"] == attr.tokens[1][:4], "without padding"
        assert [layer.shape for layer in given["attention"]] == [(1, heads, 4, 4)] * len(attr.layers)
        values = attr.maps[scope][1, 1][..., :4, :4].reshape(heads, 4, 4)
        assert torch.allclose(given["attention"][1][0], values / values.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="scope atb has 2 rows and 4 columns of other tokens"):
        attribution(queries=(1, 3, 5)).to_bertviz("atb", batch=1)


def test_bertviz_draws_it():
    bertviz = pytest.importorskip("bertviz")
    given = attribution().to_bertviz("attn_heads")
    drawn = bertviz.head_view(**given, html_action="return").data
    assert f"{float(given['attention'][0][0, 1, 2, 0])}" in drawn
