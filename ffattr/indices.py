"""Which of a number of things a user asks for: layers, query tokens, key tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Indices", "indices"]

Indices = int | slice | Sequence[int] | None


def indices(name: str, asked: Indices, count: int) -> tuple[int, ...]:
    """From 0 to ``count - 1``, in the order asked for; None asks for all, negative ones count from the end.

    Raises TypeError or IndexError that calls them ``name``.
    """
    if asked is None:
        return tuple(range(count))
    if isinstance(asked, slice):
        return tuple(range(count)[asked])
    if not isinstance(asked, (int, Sequence)) or isinstance(asked, str):
        raise TypeError(f"{name} is {asked!r}, expected an integer, a sequence of integers, a slice or None")
    values = [asked] if isinstance(asked, int) else list(asked)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} has {value!r}, expected integers, a slice or None")
        if not -count <= value < count:
            raise IndexError(f"{name} has {value}, but there are {count}: expected {-count} to {count - 1}")
    return tuple(value % count for value in values)
