"""What tests of several commands pretend."""

import pytest
from made_tokenizers import make_tokenizer
from synthetic import attribution

from ffattr.models import pretrained
from ffattr.pipeline import attribute as attribute_module
from ffattr.pipeline import plan as plan_module


@pytest.fixture
def tokenizer():
    return make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture
def calls(monkeypatch, tokenizer):
    """Replaces loading and computing; gives the list of what they were called with."""
    seen = []

    def attribute(model, inputs, *, progress, **options):
        seen.append((model, inputs, options))
        progress(1, 2)
        return attribution()

    def plan(model, inputs, **options):
        seen.append((model, inputs, options))
        return "direct on torch [3 layers]"

    monkeypatch.setattr(pretrained, "load", lambda name: (f"model {name}", tokenizer))
    monkeypatch.setattr(attribute_module, "attribute", attribute)
    monkeypatch.setattr(plan_module, "plan", plan)
    return seen
