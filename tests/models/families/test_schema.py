"""The data of families fits what reads it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ffattr.models.families.schema import EncoderDecoder, Family, Fused, PerExpert
from ffattr.models.families.table import FAMILIES as KNOWN
from ffattr.models.spec.layer import LayerSpec

FIXED = {
    f"{name} {place}": family
    for name, entry in KNOWN.items()
    if not callable(entry)
    for place, family in (
        {"encoder": entry.encoder, "decoder": entry.decoder} if isinstance(entry, EncoderDecoder) else {"": entry}
    ).items()
}


def test_parts_have_the_names_of_a_layer() -> None:
    shared = {field.name for field in fields(Family)} & {field.name for field in fields(LayerSpec)}
    assert {"attention", "value", "out", "up", "gate", "down", "activation", "experts", "parallel", "clamp"} <= shared
    norms = {field.name for field in fields(LayerSpec) if field.name.startswith("norm_")}
    assert norms <= shared


@pytest.mark.parametrize("name", FIXED)
def test_parts_of_a_projection_are_among_its_parts(name: str) -> None:
    for field in fields(Family):
        part = getattr(FIXED[name], field.name)
        if isinstance(part, Fused | PerExpert):
            assert 0 <= part.index < part.count, field.name
