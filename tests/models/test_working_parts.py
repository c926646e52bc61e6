"""Parts of a model that a refusal names: those that work, as tried on what they get."""

from __future__ import annotations

import pytest
import torch
from own_modules import Block, Mine, TwoStacks, mine
from tiny_models import build, ids
from torch import Tensor, nn

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.working_parts import Tried, try_parts

pytestmark = pytest.mark.usefixtures("one_thread")


class Both(nn.Module):
    """Two models side by side, of which ``second`` may be one that is not mapped."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.hidden = mine(), second, build("bert")

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(ids) + self.second(ids)


def test_a_part_that_is_named_works() -> None:
    model, tokens = Both(mine()).eval(), ids() % 50
    with pytest.raises(UnsupportedModel, match=r"more than one list of layers") as caught:
        ffattr.attribute(model, tokens)
    text = str(caught.value)
    assert "is mapped, as tried on what it gets here: pass model.first (structure of Mine) or model.second" in text
    assert "Inside, but not tried, since it did not run here: model.hidden (bert)" in text
    for part in (model.first, model.second):
        assert float(ffattr.attribute(part, tokens).error.max()) < 1e-12


def test_a_part_that_does_not_work_is_not_named() -> None:
    model, tokens = Both(mine(residual=0.99)).eval(), ids() % 50
    with pytest.raises(UnsupportedModel, match=r"more than one list of layers") as caught:
        ffattr.attribute(model, tokens)
    assert "pass model.first (structure of Mine), with such inputs" in str(caught.value)
    assert "model.second" not in str(caught.value).split("\n\n")[0]


def test_lists_that_cannot_be_run_are_not_named() -> None:
    """Of two lists, a Sequential runs; a ModuleList, which is called by nobody, does not."""
    model = TwoStacks().eval()
    with pytest.raises(UnsupportedModel, match=r"list of layers: 'blocks', 'more'") as caught:
        resolve(model)
    assert "pass model.blocks (structure of Sequential), with such inputs" in str(caught.value)
    assert "model.more" not in str(caught.value)


def test_what_is_tried() -> None:
    """The whole fails, since an output is no tensor, but not before both have run; a table is no model."""
    model = Both(build("bert")).eval()
    paths = ["first", "second", "hidden", "first.embedding"]
    tried = try_parts(model.eval(), paths, [{"ids": "no ids"}, {"ids": ids() % 50}], resolve)
    assert tried == Tried({"first": "structure of Mine", "second": "bert"}, ("hidden",))
    tried = try_parts(mine(), ["blocks", "blocks.0.ff"], [{"ids": ids() % 50}], resolve)
    assert tried == Tried({"blocks": "structure of Sequential"}, ())


def test_a_known_part_is_compared_with_itself() -> None:
    """One that its family does not describe any more."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build("llama")

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.body(input_ids=input_ids).last_hidden_state  # type: ignore[no-any-return]

    head = Head().eval()
    assert try_parts(head, ["body"], [{"input_ids": ids()}], resolve).mapped == {"body": "llama"}
    layer = head.body.layers[1]
    run = layer.forward
    layer.forward = lambda *args, **kwargs: run(*args, **kwargs) * 1.5
    assert try_parts(head, ["body"], [{"input_ids": ids()}], resolve).mapped == {}


def test_blocks_alone_take_hidden_states() -> None:
    model = Mine([Block(), Block()])
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(ffattr.attribute(model.blocks, x).error.max()) < 1e-12
