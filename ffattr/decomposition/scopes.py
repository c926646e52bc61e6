"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

__all__ = ["CROSS"]


CROSS = "cross."


"""What the names of scopes begin with whose keys are the tokens of an encoder, seen by cross-attention."""


class Scoped:
    """Scopes of a layer whose norms are modules (`LayerSpec`) or parameters (`LayerWeights`), None where none is."""

    norm_after_attn: object | None
    norm_before_ff: object | None
    norm_after_ff: object | None
    parallel: bool
    cross: object | None

    @property
    def own_scopes(self) -> tuple[str, ...]:
        """Scope names in order: attention, residual, norm, feed-forward block, residual, norm, those that there are.

        In a layer with cross-attention ``atb`` is the stream after both attentions.
        """
        names = ["attn_heads", "attn"]
        if self.norm_after_attn is not None:
            names.append("attn_res")
        names.append("atb")
        stem = "atb"
        if self.norm_before_ff is not None:
            stem = "atb_ln"
            names.append(stem)
        names += [f"{stem}_ff", f"{stem}_ff_res"]
        if self.norm_after_ff is not None:
            names.append(f"{stem}_ff_res_ln")
        return tuple(names)

    @property
    def scopes(self) -> tuple[str, ...]:
        """`own_scopes`, and for layers with cross-attention the same of the encoder's tokens, prefixed with `CROSS`."""
        own = self.own_scopes
        return own if self.cross is None else own + tuple(CROSS + name for name in own)

    @property
    def ff_scopes(self) -> tuple[str, ...]:
        """Those of `own_scopes` from the feed-forward block on."""
        return tuple(name for name in self.own_scopes if "_ff" in name)

    @property
    def wide_scopes(self) -> tuple[str, ...]:
        """Those of `own_scopes` that take d-wide work for every pair, which one pass yields together.

        None in a parallel layer, whose feed-forward block reads no token but the query's own.
        """
        return () if self.parallel else self.ff_scopes

    @property
    def expert_scope(self) -> str:
        """What the first feed-forward scope is called where it is told apart by expert."""
        return f"{self.ff_scopes[0]}_experts"
