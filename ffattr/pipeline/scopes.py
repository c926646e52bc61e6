"""Turns the names that a user gives into the scopes of each stack of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..decomposition.scopes import Scope
from ..models.spec.layer import LayerSpec

__all__ = ["parse_scopes"]


def parse_scopes(asked: str | Sequence[str], stacks: Mapping[str, Sequence[LayerSpec]]) -> dict[str, tuple[Scope, ...]]:
    """The scopes of each stack that has any: of the model's only one (""), or of its "encoder" and its "decoder".

    ``asked`` is a name or names; "layer" stands for the last scope, "all" for all of them but those per expert, which
    have to be named. With an encoder and a decoder, "encoder.", "decoder." or "cross." before a name says where;
    without it, everywhere. Raises TypeError or ValueError.
    """
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise TypeError(f"scopes is {asked!r}, expected a scope's name or a sequence of names")
    names = [asked] if isinstance(asked, str) else list(asked)
    known = _list_known(stacks)
    chosen: set[tuple[str, Scope]] = set()
    for name in names:
        place, _, scope = name.rpartition(".")
        found = {
            (stack, match)
            for (where, stack), (scopes, by_expert) in known.items()
            for match in _match_name(scope, scopes, by_expert)
            if place in ("", where)
        }
        if not found:
            raise ValueError(f"unknown scope {name!r}; {_describe_known(known)}")
        chosen |= found
    if not chosen:
        raise ValueError(f"no scope given; {_describe_known(known)}")
    result: dict[str, tuple[Scope, ...]] = {}
    for (_, stack), (scopes, by_expert) in known.items():
        wanted = tuple(scope for scope in (*scopes, *by_expert) if (stack, scope) in chosen)
        if wanted:
            result[stack] = result.get(stack, ()) + wanted
    return result


_Known = dict[tuple[str, str], tuple[tuple[Scope, ...], tuple[Scope, ...]]]


def _list_known(stacks: Mapping[str, Sequence[LayerSpec]]) -> _Known:
    """Every ``(name of the place, stack)`` with its scopes, and those per expert."""
    known: _Known = {}
    for stack, specs in stacks.items():
        own, by_expert = specs[0].own_scopes, specs[0].expert_scope
        mixture = any(spec.experts is not None for spec in specs)
        known[stack, stack] = own, (by_expert,) * mixture
        if specs[0].cross is not None:
            across = tuple(scope.seen_from("cross") for scope in own)
            known["cross", stack] = across, (by_expert.seen_from("cross"),) * mixture
    return known


def _match_name(name: str, scopes: tuple[Scope, ...], by_expert: tuple[Scope, ...]) -> tuple[Scope, ...]:
    if name == "all":
        return scopes
    if name == "layer":
        return scopes[-1:]
    return tuple(scope for scope in (*scopes, *by_expert) if scope.name == name)


def _describe_known(known: _Known) -> str:
    aliases = "('layer' for the last, 'all' for all"
    if len(known) == 1:
        ((scopes, by_expert),) = known.values()
        apart = f" but {by_expert[0].name})" if by_expert else ")"
        return f"this architecture has: {', '.join(scope.name for scope in (*scopes, *by_expert))} {aliases}{apart}"
    lists = (
        f"{place}: {', '.join(scope.name for scope in (*scopes, *by_expert))}"
        for (place, _), (scopes, by_expert) in known.items()
    )
    return f"this architecture has, each with the name of its place and a dot before it, {'; '.join(lists)} {aliases})"
