"""Every error that ffattr raises on purpose.

All of them say what was wrong, what was expected and what to do, and name the offending value.
"""

from __future__ import annotations

__all__ = [
    "ArchitectureMismatch",
    "BackendUnavailable",
    "CaptureError",
    "FfattrError",
    "FileFormatError",
    "ForwardError",
    "NonFiniteError",
    "OutOfMemory",
    "UnsupportedModel",
]


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
