"""What is said of models whose structure was not found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from own_modules import (
    Attention,
    Block,
    Broken,
    Experts,
    FeedForward,
    Mine,
    Recurrent,
    TwoStacks,
    mine,
    transformers_model,
)
from recording import state
from torch import nn

import ffattr.models.registry as adapters
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled residual": (lambda: mine(residual=0.99), "output is not the sum of its input, attention and feed-forward"),
    "one scaled residual": (lambda: Mine([Block(residual=0.99), Block()]), "layer 0 of 'blocks' is not reproduced"),
    "activation": (lambda: mine(ff=lambda: FeedForward(lambda x: x.sin())), "no feed-forward block"),
    "linear": (lambda: transformers_model("Mamba", hidden_size=32, num_hidden_layers=2), "no attention was seen"),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        "no nn.ModuleList, nn",
    ),
    "attention twice": (lambda: mine(attention=lambda: Attention(times=2)), "layer 0 of 'blocks' attends 2 times"),
    "two lists": (TwoStacks, "attends in more than one list of layers: 'blocks', 'more'"),
    "broken": (
        lambda: Broken([Block()]),
        r"could not be run on a small input .ids \[2, 5\]: KeyError: 'needs a",
    ),
    "no weights": (lambda: mine().to("meta"), "its weights are on the meta device; load them"),
    "recurrent": (lambda: Recurrent().double().eval(), "2 layers of 'layers' ran 4 times"),
    "experts": (
        lambda: mine(ff=lambda: Experts(False)),
        r"mixture of experts .'ff.experts' is a list of 3 FeedForward",
    ),
    "stacked experts": (lambda: mine(ff=lambda: Experts(True)), r"experts .'ff.weight' is \[3, 24, 24\]"),
    "blocks": (
        lambda: transformers_model("Longformer", hidden_size=48, num_hidden_layers=1, attention_window=[4]),
        r"attends in pieces, with weights of .* where the layer reads \[2, 8, 48\]",
    ),
    "parameters": (
        lambda: transformers_model("XLNet", d_model=48, n_layer=1, n_head=4, d_inner=40),
        r"multiplies by parameters of its own .'q', 'k', 'v'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """With the reason, the modules, and a description to complete."""
    make, reason = REFUSED[name]
    model = make().eval()
    before = state(model)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        resolve(model)
    assert state(model) == before
    head, modules, code = str(caught.value).split("\n\n", 2)
    assert head.startswith("no adapter knows ")
    assert "ffattr.register_adapter" in head
    code = code.split(":\n\n", 1)[1]
    compile("\n".join(line.removeprefix("    ") for line in code.splitlines()), "template", "exec")
    assert "module=layer" in code
    assert modules
