"""Which scopes a user asks for, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..decomposition.scopes import CROSS
from ..models.spec.layer import LayerSpec

__all__ = ["scopes_of"]


def scopes_of(asked: str | Sequence[str], stacks: Mapping[str, Sequence[LayerSpec]]) -> dict[str, tuple[str, ...]]:
    """The scopes of each stack that has any: of the model's only one (""), or of its "encoder" and its "decoder".

    ``asked`` is a name or names; "layer" stands for the last scope, "all" for all of them but those told apart by
    expert, which have to be named. With an encoder and a decoder, "encoder.", "decoder." or "cross." before a name says
    where; without it, everywhere. Raises TypeError or ValueError.
    """
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise TypeError(f"scopes is {asked!r}, expected a scope's name or a sequence of names")
    names = [asked] if isinstance(asked, str) else list(asked)
    known = _known(stacks)
    chosen: set[tuple[str, str]] = set()
    for name in names:
        place, _, scope = name.rpartition(".")
        found = {
            (stack, match)
            for (where, stack), (scopes, by_expert) in known.items()
            for match in _matches(scope, scopes, by_expert)
            if place in ("", where)
        }
        if not found:
            raise ValueError(f"unknown scope {name!r}; {_valid(known)}")
        chosen |= found
    if not chosen:
        raise ValueError(f"no scope given; {_valid(known)}")
    result: dict[str, tuple[str, ...]] = {}
    for (_, stack), (scopes, by_expert) in known.items():
        wanted = tuple(name for name in (*scopes, *by_expert) if (stack, name) in chosen)
        if wanted:
            result[stack] = result.get(stack, ()) + wanted
    return result


_Known = dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]]


def _known(stacks: Mapping[str, Sequence[LayerSpec]]) -> _Known:
    """``(name of the place, stack)`` to its scopes, and those told apart by expert."""
    known: _Known = {}
    for stack, specs in stacks.items():
        own, by_expert = specs[0].own_scopes, specs[0].expert_scope
        mixture = any(spec.experts is not None for spec in specs)
        known[stack, stack] = own, (by_expert,) * mixture
        if specs[0].cross is not None:
            known[CROSS.rstrip("."), stack] = tuple(CROSS + name for name in own), (CROSS + by_expert,) * mixture
    return known


def _matches(scope: str, scopes: tuple[str, ...], by_expert: tuple[str, ...]) -> tuple[str, ...]:
    if scope == "all":
        return scopes
    if scope == "layer":
        return scopes[-1:]
    return tuple(name for name in (*scopes, *by_expert) if name.removeprefix(CROSS) == scope)


def _valid(known: _Known) -> str:
    aliases = "('layer' for the last, 'all' for all"
    if len(known) == 1:
        ((scopes, by_expert),) = known.values()
        apart = f" but {by_expert[0]})" if by_expert else ")"
        return f"this architecture has: {', '.join((*scopes, *by_expert))} {aliases}{apart}"
    lists = (
        f"{place}: {', '.join(name.removeprefix(CROSS) for name in (*scopes, *by_expert))}"
        for (place, _), (scopes, by_expert) in known.items()
    )
    return f"this architecture has, each with the name of its place and a dot before it, {'; '.join(lists)} {aliases})"
