"""The drawing of both kinds of layers."""

from xml.etree import ElementTree

import tiny_models
from tiny_models import inputs

import ffattr
from ffattr.report.drawing import LAYERS, draw_layers


def test_it_names_the_scopes_that_there_are_in_their_order():
    for name, parts in zip(("bert", "gpt2"), LAYERS.values(), strict=True):
        attr = ffattr.attribute(tiny_models.build(name), inputs(name), scopes="all")
        assert [scope for _, scope in parts if scope] == [scope for scope in attr.scopes if scope != "attn_heads"]


def test_it_is_one_picture_with_all_names_inside():
    svg = ElementTree.fromstring(draw_layers())
    width, height = (float(value) for value in svg.get("viewBox").split()[2:])
    texts = list(svg.iter("text"))
    names = [text.text for text in texts]
    for parts in LAYERS.values():
        assert {scope for _, scope in parts if scope} <= set(names)
    assert all(0 <= float(text.get("x")) <= width - 20 for text in texts)
    assert height < width
