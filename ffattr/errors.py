"""Every error that ffattr raises on purpose.

All of them say what was wrong, what was expected and what to do, and name the offending value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = [
    "ArchitectureMismatch",
    "BackendUnavailable",
    "CaptureError",
    "FfattrError",
    "FileFormatError",
    "ForwardError",
    "MissingExtra",
    "NonFiniteError",
    "OutOfMemory",
    "UnsupportedModel",
]

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_VIEWS = ("pandas", "matplotlib", "xarray")


class FfattrError(Exception):
    """Base class of the errors that are about ffattr rather than about an argument's type or value."""


class UnsupportedModel(FfattrError, TypeError):
    """The model's architecture is not known to any adapter, or has a part that no formula here covers."""


class ArchitectureMismatch(FfattrError):
    """The layer output recomputed from the adapter's description is not the output the model gave."""


class CaptureError(FfattrError):
    """The forward pass did not hand over what the decomposition needs, or changed while being recorded."""


class FileFormatError(FfattrError, ValueError):
    """A file is not one that ffattr wrote, is damaged, or is of a newer format."""


class ForwardError(FfattrError, ValueError):
    """The model's own forward pass raised on the inputs that it was given; what it raised is the cause."""


class NonFiniteError(FfattrError, ValueError):
    """A weight, an activation or a result is NaN or infinite."""


class BackendUnavailable(FfattrError, RuntimeError):
    """The backend asked for cannot run here; the message says why."""


class OutOfMemory(FfattrError, MemoryError):
    """A layer does not fit the memory of its device even in the smallest blocks."""


class MissingExtra(FfattrError, ImportError):
    """Something is asked for that stands on packages of an extra that is not installed; the message says which."""


def names_missing_extra(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Makes a function that imports pandas, matplotlib or xarray where it needs them raise `MissingExtra` without.

    >>> from ffattr.errors import names_missing_extra
    >>> @names_missing_extra
    ... def draw():
    ...     raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    >>> draw()
    Traceback (most recent call last):
    ffattr.errors.MissingExtra: draw needs matplotlib, which is not installed: pip install 'ffattr[views]'
    """

    @functools.wraps(function)
    def call(*arguments: _Given.args, **options: _Given.kwargs) -> _Found:
        try:
            return function(*arguments, **options)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _VIEWS:
                raise
            raise MissingExtra(
                f"{function.__name__} needs {package}, which is not installed: pip install 'ffattr[views]'"
            ) from None

    return call
