"""Parameters that are NaN or infinite are named first, whatever fails because of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch import nn

from ..errors import FfattrError, NonFiniteError

__all__ = ["name_broken_weights"]

_MOST = 5
"""Names that a message lists."""

_Compute = TypeVar("_Compute", bound=Callable[..., Any])


def name_broken_weights(compute: _Compute) -> _Compute:
    """Makes a function of a model blame the model's NaN and infinite parameters for an `FfattrError`, where there are.

    Without it a weight that is NaN looks like an architecture that is not what it seems, or a model that is random.
    """

    @functools.wraps(compute)
    def compute_or_blame(model: nn.Module, *args: Any, **options: Any) -> Any:
        try:
            return compute(model, *args, **options)
        except FfattrError as error:
            names = list(itertools.islice(_list_broken(model), _MOST + 1)) if isinstance(model, nn.Module) else []
            if not names:
                raise
            more = ", ..." if len(names) > _MOST else ""
            raise NonFiniteError(
                f"parameters of {type(model).__name__} have NaN or infinite entries: {', '.join(names[:_MOST])}{more}. "
                f"Load or repair them first. ({error})"
            ) from error

    return cast(_Compute, compute_or_blame)


def _list_broken(model: nn.Module) -> Iterator[str]:
    """Yields the names of floating-point parameters that are not finite; masks among buffers may hold infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(parameter.isfinite().all()):
            yield name
