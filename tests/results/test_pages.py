"""Attributions as HTML: pages and what a notebook shows."""

import re
from dataclasses import replace

import pytest
import torch
from keeping import kept, some
from synthetic import attribution

from ffattr import Pool, Reduce, TopK
from ffattr.analysis import alignment

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "'", "</td>", "<!--"]


def test_a_notebook_shows_a_map_in_which_tokens_are_text():
    attr = attribution(tokens=6, real=(6,))
    attr.tokens = [HOSTILE]
    text = attr._repr_html_()
    assert not re.search(r"<(?!/?(div|code|table|caption|tr|th|td)\b)", text)
    assert "&lt;script&gt;alert(1…" in text
    assert text.count("<td") == 36
    assert re.search(r'title="[\d.]+ \([\d.]+%\)"', text)
    assert "script>" not in text.replace("&lt;script&gt;", "")


def test_a_notebook_is_shown_little_of_much():
    attr = attribution(tokens=300, real=(300,))
    text = attr._repr_html_()
    assert text.count("<td") == 24 * 24
    assert "first 24 tokens" in text
    assert len(text) < 100_000


@pytest.mark.parametrize("asked", [TopK(2), Pool(2)])
def test_a_notebook_shows_what_was_kept(asked):
    assert "<table" in kept(asked, some(("atb", "atb_ff")))._repr_html_()


def test_a_notebook_shows_a_line_where_no_map_is():
    assert kept(Reduce(lambda rows: None), some(("atb",)))._repr_html_().count("<") == 4
    assert "<table" not in attribution(layers=())._repr_html_()
    assert "<table" not in attribution(queries=())._repr_html_()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    attr = attribution(("atb", "atb_ff"))
    path = tmp_path / "maps.html"
    attr.to_html(path, title="A title <b>")
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>A title &lt;b&gt;</title>" in text
    with pytest.raises(ValueError, match="larger than"):
        attr.to_html(tmp_path / "small.html", limit=1000)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        attr.to_html(tmp_path / "missing" / "maps.html")
    with pytest.raises(ValueError, match="keep=Reduce"):
        kept(Reduce(lambda rows: None), some(("atb",))).to_html(tmp_path / "none.html")
    with pytest.raises(KeyError, match="no scope 'atb_ln' here"):
        attr.to_html(tmp_path / "none.html", scopes="atb_ln")
    monkeypatch.setattr("ffattr.results.pages.render_page", lambda *_: iter(["half", 1]))
    with pytest.raises(TypeError):
        attr.to_html(path)
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["maps.html"]


def test_a_page_says_how_wrong_a_sketch_is(tmp_path):
    attr = attribution(("atb", "atb_ff"))
    attr.to_html(tmp_path / "exact.html")
    assert "sketch" not in _facts(tmp_path / "exact.html")
    errors = torch.full((3, 2), 0.01)
    errors[1, 1] = 0.0234
    replace(attr, sketch_error={"atb_ff": errors}).to_html(tmp_path / "sketch.html")
    assert '["median error of the sketch","at most 2.34%"]' in _facts(tmp_path / "sketch.html").replace('", "', '","')


def _facts(path):
    text = path.read_text()
    start = text.index('"facts":')
    return text[start : text.index("]]", start) + 2]


def test_padding_experts_and_blocks_have_pages(tmp_path):
    attr = some(("atb", "atb_ff"), queries=(6, 3, 4, 0))
    attr.to_html(tmp_path / "a.html")
    kept(TopK(2), attr).to_html(tmp_path / "b.html")
    heads = kept(TopK(2), some(("attn_heads", "atb")))
    heads.to_html(tmp_path / "d.html")
    assert '"head 1"' in (tmp_path / "d.html").read_text()
    kept(Pool(2), attr).to_html(tmp_path / "c.html")
    assert "tok1.2" in (tmp_path / "a.html").read_text()
    assert "tok1.1" not in (tmp_path / "a.html").read_text()  # padding


def test_a_page_tells_whether_the_network_cancels_where_its_scopes_do():
    attr = attribution(("atb", "atb_ff", "atb_ff_res"))
    found = alignment(attr, "sequence")
    for batch, panel in enumerate(attr._make_panels(attr.scopes)):
        rows = found[found["batch"] == batch]
        assert [tuple(angle) for angle in panel.angles] == [
            (row.layer, row.pairs_of, row.median, row.negative) for row in rows.itertuples()
        ]
        assert len(panel.angles) == 2 * len(attr.layers)
    assert all(not panel.angles for panel in attribution(("atb", "atb_ff"))._make_panels(("atb", "atb_ff")))
