"""Contributions as HTML."""

import re

import pytest
import torch
from made_contributions import HOSTILE, contributions
from page_data import read_page

from ffattr import Reduce, TopK
from ffattr.results.kept.dense import DenseMaps
from ffattr.results.kept.pool import PooledMaps
from ffattr.results.signed.pages import make_panels


def page(c, path):
    c.to_html(path, title="A title <b>")
    return read_page(path.read_text(encoding="utf-8"))


def test_a_page_holds_scores_and_flow_of_every_number_and_sequence(tmp_path):
    c = contributions()
    data, read = page(c, tmp_path / "a.html")
    assert [panel["name"][:3] for panel in data["panels"]] == ["1: ", "2: "]
    second = data["panels"][1]
    assert second["keys"] == ["tok1.2", "tok1.3", "tok1.4", "tok1.5"]
    assert second["scopes"] == [" target 0.1", " target 1.1"]
    shown, _ = read(second["scores"]["maps"][" target 1.1"], 4)
    torch.testing.assert_close(shown, c.scores[1, :, 1, 2:], rtol=3e-4, atol=0)
    shown, _ = read(second["maps"][" target 1.1"][2][0], 4)
    torch.testing.assert_close(shown, c.flow[1, 2, 1, 2:, 2:], rtol=3e-4, atol=0)
    rest = second["scores"]["rest"][" target 1.1"]["bias"]
    assert rest == pytest.approx(c.bias[1, :, 1].tolist(), rel=1e-6)
    assert second["scores"]["readAt"] == {" target 0.1": 5, " target 1.1": 5}
    text = (tmp_path / "a.html").read_text()
    assert "<title>A title &lt;b&gt;</title>" in text
    assert '["largest error","1.0e-07"]' in text


def test_every_stack_of_a_model_adds_up_to_its_number(tmp_path):
    c = contributions(encoder=True)
    data, read = page(c, tmp_path / "a.html")
    names = [panel["name"].split(",")[0] for panel in data["panels"]]
    assert names == ["encoder", "decoder", "cross"] * 2
    for panel in data["panels"]:
        for number, scores in panel["scores"]["maps"].items():
            _, sums = read(scores, len(panel["keys"]))
            rest = torch.tensor(list(panel["scores"]["rest"][number].values())).sum(0)
            value = torch.tensor(panel["scores"]["values"][number])
            torch.testing.assert_close(sums + rest, value.expand(len(sums)), rtol=1e-4, atol=1e-5)
    cross = data["panels"][2]
    assert (len(cross["queries"]), len(cross["keys"]), cross["same"]) == (6, 5, False)
    shown, _ = read(cross["maps"][" target 0.0"][1][0], 5)
    torch.testing.assert_close(shown, c.cross_flow[0, 1, 0], rtol=3e-4, atol=0)


def test_heads_come_beside_their_sum(tmp_path):
    c = contributions(targets=1, flow="heads", real=(6,))
    data, read = page(c, tmp_path / "a.html")
    (panel,) = data["panels"]
    assert panel["parts"] == {" target 0.0": ["sum", "head 0", "head 1"]}
    whole, *heads = (read(one, 6)[0] for one in panel["maps"][" target 0.0"][0])
    torch.testing.assert_close(heads[1], c.flow[0, 0, 0, 1], rtol=3e-4, atol=0)
    torch.testing.assert_close(whole, c.flow[0, 0, 0].sum(0) + c.residual[0, 0, 0].diag(), rtol=3e-4, atol=1e-12)


def test_blocks_have_the_sums_of_their_scores():
    c = contributions(targets=1, real=(4,))
    maps = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    c.kept = PooledMaps({"flow": maps}, block=2)
    (panel,) = make_panels(c)
    assert panel.keys == ["tok0.2 … tok0.3", "tok0.4 … tok0.5"]
    assert panel.scores.read_at == {" target 0.0": 4}
    found = panel.scores.read(" target 0.0")
    torch.testing.assert_close(found, c.scores[0, :, 0, 2:].unflatten(1, (2, 2)).sum(-1))
    torch.testing.assert_close(panel.read(" target 0.0", 1), maps[1, 0, 1:, 1:].double())


def test_numbers_of_one_name_are_told_apart():
    c = contributions(targets=3, real=(6,))
    c.targets = [[" a"], [" a"], [" b"]]
    c.positions = torch.tensor([[3], [4], [5]])
    assert make_panels(c)[0].scopes == [" a at 3", " a at 4", " b"]
    c.positions[:] = 5
    assert make_panels(c)[0].scopes == [" a at 0", " a at 1", " b"]


@pytest.mark.parametrize("kept", [None, Reduce(print).kept(), TopK(2).kept(), DenseMaps()])
def test_without_flow_there_are_scores_alone(tmp_path, kept):
    c = contributions()
    c.kept = kept
    data, _ = page(c, tmp_path / "a.html")
    assert [panel["maps"] for panel in data["panels"]] == [{}, {}]
    assert data["panels"][0]["scores"]["maps"]


def test_a_page_that_does_not_fit_is_refused_and_a_sequence_of_padding_is_left_out(tmp_path):
    c = contributions()
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        c.to_html(tmp_path / "a.html", limit=1000)
    assert not list(tmp_path.iterdir())
    c.mask[1] = False
    assert len(make_panels(c)) == 1


def test_a_notebook_shows_text_in_colours_in_which_tokens_are_text():
    c = contributions(targets=5, encoder=True)
    c.tokens = [[HOSTILE, "</p>", "&amp;", "a\n", "'", '"'], *c.tokens[1:]]
    text = c._repr_html_()
    assert not re.search(r"<(?!/?(div|code|p|b|i|br|span|small)\b)", text)
    assert "&lt;img src=x" in text
    assert text.count("<span") == 3 * (6 + 5)
    assert "2 more numbers" in text
    first = re.search(r'title="([^"]+)" style="background:rgba\(([^)]+),', text)
    score = float(c.encoder.scores[0, 0, 0, 0])
    assert first[1] == f"{score:+.4g}"
    assert first[2] == ("70,145,205" if score > 0 else "224,138,60")
    long = contributions(targets=1, tokens=900, real=(900,), flow=False)._repr_html_()
    assert long.count("<span") == 300
    assert "…" in long
