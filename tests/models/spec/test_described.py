"""What a description says of a whole model."""

from __future__ import annotations

import pytest
import tiny_models
from tiny_models import build
from torch import nn

from ffattr.models.registry import resolve
from ffattr.models.spec.described import ModelDescription


def test_stacks_part_the_layers() -> None:
    description = resolve(build("bart"))
    assert [*description.stacks["encoder"], *description.stacks["decoder"]] == list(range(len(description.layers)))
    assert description.max_positions == description.decoder_positions == tiny_models.POSITIONS


def test_what_is_not_said_is_not_bounded() -> None:
    model = nn.Identity()
    description = ModelDescription(model, (), "mine")
    assert (description.stacks, description.special_tokens, description.batch_first) == ({}, (), True)
    assert description.max_positions is description.decoder_positions is None


@pytest.mark.parametrize(("name", "special"), [("vit", ("[CLS]",)), ("deit", ("[CLS]", "[DIST]")), ("bert", ())])
def test_special_tokens(name: str, special: tuple[str, ...]) -> None:
    assert resolve(build(name)).special_tokens == special
