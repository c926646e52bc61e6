"""The tokens that a decoder reads where a user passes none, and the model makes them itself: of what its encoder reads
(BART's classifiers), or of labels (Whisper)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..capture.passes import attach_hook
from ..capture.run import Reached, run_undisturbed

__all__ = ["learn_decoder_ids"]


def learn_decoder_ids(base: nn.Module, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Runs ``model``, whose headless part is ``base``, on ``inputs`` until its decoder begins, and returns the ids
    ``[B, T]`` that this reads; None where it reads none, or where the model does not run so."""
    decoder = _find_decoder(base)
    if decoder is None:
        return None
    known = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    given = {name: value for name, value in inputs.items() if name in known and value is not None}

    def stop_with_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(kwargs.get("input_ids", args[0] if args else None))

    try:
        with run_undisturbed(model), ExitStack() as stack, stack:
            attach_hook(stack, decoder.register_forward_pre_hook, stop_with_ids, with_kwargs=True)
            model(**given)
    except Reached as reached:
        return reached.found if isinstance(reached.found, Tensor) and reached.found.dim() == 2 else None
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None  # it says itself what it lacks, or nothing can be learnt
    return None


def _find_decoder(base: Any) -> nn.Module | None:
    found = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "decoder", None)
    return found if isinstance(found, nn.Module) and found is not base else None
