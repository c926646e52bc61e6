"""The points of a layer at which its residual stream is decomposed, and what they are called.

A *scope* says how far through the layer vectors are carried, whose tokens they come from, and whether they are summed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

__all__ = ["CROSS", "Axis", "Point", "Scope", "Scoped", "Source"]

CROSS = "cross."
"""What the names of scopes begin with whose keys are the tokens of an encoder, seen by cross-attention."""

Source = Literal["own", "cross"]
"""Whose tokens the keys are: the layer's own, or those of an encoder."""

Axis = Literal["head", "expert"]
"""What vectors may be kept apart by instead of being summed over it."""

Point = Literal["attn", "attn_res", "atb", "ff_input", "ff", "ff_res", "ff_res_ln"]
"""The place at which a layer is decomposed: after attention, its residual connection, and the norm behind that
(``atb``, the whole attention block); what the feed-forward block reads, after a norm of its own; and the same again of
that block."""


@dataclass(frozen=True)
class Scope:
    """A point of a layer, with the name it has among the scopes of one source, ``"atb_ff"``.

    ``axis``: vectors are not summed over heads, or over the experts of a mixture.
    """

    name: str
    point: Point
    source: Source = "own"
    axis: Axis | None = None

    @property
    def needs_ff(self) -> bool:
        """Whether the feed-forward block lies before this point."""
        return self.point in ("ff", "ff_res", "ff_res_ln")

    def seen_from(self, source: Source) -> Scope:
        """The same point, for the tokens of ``source``."""
        return self if source == self.source else replace(self, source=source)

    def __str__(self) -> str:
        """The name among all scopes of a layer, ``"cross.atb_ff"``."""
        return f"{CROSS if self.source == 'cross' else ''}{self.name}"


class Scoped:
    """Scopes of a layer whose norms are modules (`LayerSpec`) or parameters (`LayerWeights`), None where none is."""

    norm_after_attn: object | None
    norm_before_ff: object | None
    norm_after_ff: object | None
    parallel: bool
    cross: object | None

    @cached_property
    def own_scopes(self) -> tuple[Scope, ...]:
        """The scopes of the layer's own tokens in order, those there are: per head, attention, residual, norm,
        feed-forward block, residual, norm. In a layer with cross-attention ``atb`` is the stream after both attentions.
        """
        found = [Scope("attn_heads", "attn", axis="head"), Scope("attn", "attn")]
        if self.norm_after_attn is not None:
            found.append(Scope("attn_res", "attn_res"))
        found.append(Scope("atb", "atb"))
        stem = "atb"
        if self.norm_before_ff is not None:
            stem = "atb_ln"
            found.append(Scope(stem, "ff_input"))
        found += [Scope(f"{stem}_ff", "ff"), Scope(f"{stem}_ff_res", "ff_res")]
        if self.norm_after_ff is not None:
            found.append(Scope(f"{stem}_ff_res_ln", "ff_res_ln"))
        return tuple(found)

    @property
    def all_scopes(self) -> tuple[Scope, ...]:
        """`own_scopes`, and for layers with cross-attention the same of the encoder's tokens."""
        own = self.own_scopes
        return own if self.cross is None else own + tuple(scope.seen_from("cross") for scope in own)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of `all_scopes`."""
        return tuple(map(str, self.all_scopes))

    @cached_property
    def pairwise_scopes(self) -> tuple[Scope, ...]:
        """Those of `own_scopes` behind the feed-forward block that take work of the model's width for every pair of
        tokens, which one pass yields together.

        There are none in a parallel layer, whose feed-forward block reads no token but the query's own.
        """
        return () if self.parallel else tuple(scope for scope in self.own_scopes if scope.needs_ff)

    @property
    def expert_scope(self) -> Scope:
        """The first scope behind the feed-forward block of a mixture, per expert."""
        ff = self.scope_at("ff")
        return Scope(f"{ff.name}_experts", "ff", axis="expert")

    def pick_scopes(self, names: Collection[str]) -> tuple[Scope, ...]:
        """Those of the layer's scopes, the one per expert included, that are called ``names``, in order."""
        sources: tuple[Source, ...] = ("own", "cross") if self.cross is not None else ("own",)
        every = (*self.all_scopes, *(self.expert_scope.seen_from(source) for source in sources))
        return tuple(scope for scope in every if str(scope) in names)

    def scope_at(self, point: Point, source: Source = "own") -> Scope:
        """The scope at a point that the layer has, summed. Raises `KeyError` where it has none."""
        for scope in self.own_scopes:
            if scope.point == point and scope.axis is None:
                return scope.seen_from(source)
        raise KeyError(point)
