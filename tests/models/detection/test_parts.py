"""What was found is a value: two findings of the same are equal."""

from __future__ import annotations

from ffattr.models.detection.parts import Cut, Product, StackedPart


def test_parts_are_compared_by_what_they_say() -> None:
    assert Cut("a", 0, 3) == Cut("a", 0, 3, groups=1) != Cut("a", 0, 3, groups=2)
    assert Product("a", "b") != Product("a", "b", is_number=True)
    assert (
        StackedPart("a", "w")
        == StackedPart("a", "w", None, 0, None, 1, False, 1.0)
        != StackedPart("a", "w", factor=2.0)
    )
    assert len({Cut("a", 0, 3), Cut("a", 0, 3), Product("a", "b")}) == 2
