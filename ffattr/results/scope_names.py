"""What names of scopes say: the axis that maps have besides rows and columns, and the stack that a full name begins
with. Nothing else in `ffattr.results` takes them apart.
"""

from __future__ import annotations

__all__ = ["extra_axis", "join_stack", "split_stack"]


def extra_axis(scope: str) -> str | None:
    """Returns ``"head"`` or ``"expert"``, whose axis comes before the last two of the maps, or None."""
    return "head" if scope == "attn_heads" else "expert" if scope.endswith("_experts") else None


def split_stack(name: str) -> tuple[str, str]:
    """Returns stack and scope of a full name, ``"decoder.atb"``; the stack is ``""`` where there is no dot."""
    stack, _, scope = name.rpartition(".")
    return stack, scope


def join_stack(stack: str, scope: str) -> str:
    """Returns the full name of a scope of a stack."""
    return f"{stack}.{scope}"
