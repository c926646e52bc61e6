"""What every function that takes a model does about it first: it opens what people hold one in, and names parameters
that are NaN or infinite, whatever fails because of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch import nn

from ..errors import FfattrError, NonFiniteError
from ..models.containers import open_container

__all__ = ["accept_containers", "name_broken_weights"]

_MOST = 5
"""Names that a message lists."""

_Compute = TypeVar("_Compute", bound=Callable[..., Any])


def accept_containers(compute: _Compute) -> _Compute:
    """Lets ``compute(model, ..., tokenizer=None)`` take a pipeline of transformers or a SentenceTransformer, whose
    tokenizer is then the default."""

    @functools.wraps(compute)
    def open_and_compute(model: Any, *args: Any, tokenizer: Any = None, **options: Any) -> Any:
        model, tokenizer = open_container(model, tokenizer)
        return compute(model, *args, tokenizer=tokenizer, **options)

    return cast(_Compute, open_and_compute)


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
    """Yields the names of floating-point parameters that are not finite; masks among buffers may hold infinity.

    Quantised ones, of classes of their own, may answer no such question.
    """
    for name, parameter in model.named_parameters():
        readable = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        if readable and not bool(parameter.isfinite().all()):
            yield name
