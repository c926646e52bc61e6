"""What an attack on ffattr is judged by, and values that nobody should pass.

A try ends in one of four ways. ``own``: an error that ffattr raises on purpose, of a documented kind. ``right``: a
result that is what it should be. ``foreign``: any other error, raised by accident. ``wrong``: a result that is not.
Whatever it is, nothing may be left changed: the model, its hooks, torch's global state.

``FFATTR_FUZZ=N`` tries N examples of each kind instead of a few. ``FFATTR_COUNT=1`` lets no test fail for what it
found: what the end of ``pytest tests/robust`` lists is then all that there is, of this version or of another one.
"""

from __future__ import annotations

import hashlib
import math
import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import nn

from ffattr.errors import FfattrError

FUZZ = int(os.environ.get("FFATTR_FUZZ", "0"))
COUNTING = os.environ.get("FFATTR_COUNT") == "1"
DOCUMENTED = (FfattrError, ValueError, TypeError, LookupError, OSError)
TALLY: dict[str, Counter[str]] = defaultdict(Counter)
FOUND: list[str] = []
"""What was foreign or wrong, in words."""


def examples(few: int) -> Any:
    """The settings of a test: the same examples every time, ``few`` of them or as many as were asked for."""
    return hypothesis.settings(
        max_examples=FUZZ or few,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


class Own(Exception):
    """What a judged call raised, where it was one of ffattr's own errors."""


def is_own(error: BaseException) -> bool:
    """Tells an error that ffattr raises on purpose: by a ``raise`` of its own, or as the system's about a file.

    Of operators in C++ it is the contract's, which begins with their name.
    """
    if isinstance(error, (OSError, Own)):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, DOCUMENTED) and "/ffattr/" in last.filename and (last.line or "").startswith("raise"):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, NotImplementedError)) and (
        "ffattr::" in text or text.startswith(("ff_norms: ", "operator_norms: ", "gram_norms: ", "ig_slope: "))
    )


def describe_world(model: nn.Module | None = None) -> tuple[object, ...]:
    """Returns all that a call has to leave as it was."""
    found: list[object] = [
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        torch._C._len_torch_function_stack(),
    ]
    try:
        from transformers.modeling_utils import AttentionInterface

        found.append(sorted(AttentionInterface._global_mapping))
    except ImportError:
        pass
    if model is not None:
        hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), one.training) for one in model.modules()]
        found.append(hooks)
        config: Any = getattr(model, "config", None)
        found.append(getattr(config, "_attn_implementation", None))
        digest = hashlib.sha256()
        for tensor in (*model.parameters(), *model.buffers()):
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return tuple(found)


def judge(
    area: str,
    call: Callable[[], Any],
    is_right: Callable[[Any], bool] = lambda result: True,
    model: nn.Module | None = None,
) -> str:
    """Makes a call and counts how it ended, in ``area``. Fails for what is foreign or wrong, and for what is left.

    Interrupts are no part of it.
    """
    before = describe_world(model)
    reason: BaseException | None = None
    try:
        result = call()
    except Exception as error:
        outcome, reason = ("own" if is_own(error) else "foreign"), error
    else:
        try:
            outcome = "right" if is_right(result) else "wrong"
        except AssertionError as error:
            outcome, reason = "wrong", error
    if describe_world(model) != before:
        outcome = "wrong"
        reason = reason or AssertionError("something was left changed")
    TALLY[area][outcome] += 1
    if outcome in ("foreign", "wrong"):
        where = traceback.extract_tb(reason.__traceback__)[-1:] if reason is not None else []
        at = "".join(f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in where)
        FOUND.append(f"{area}: {outcome}: {type(reason).__name__}: {str(reason)[:200]}{at}")
        if not COUNTING:
            raise AssertionError(FOUND[-1]) from reason
    return outcome


def note(area: str, same: bool, what: str) -> None:
    """Counts, in ``area``, whether everything was as it should be, and fails where it was not."""
    TALLY[area]["right" if same else "wrong"] += 1
    if not same:
        FOUND.append(f"{area}: wrong: {what}")
        assert COUNTING, what


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Whether two tensors are the same within ``bound`` of the largest number."""
    if found.shape != expected.shape:
        return False
    if found.numel() == 0:
        return True
    size = max(float(expected.abs().max()), 1e-30)
    return bool(((found.double() - expected.double()).abs() <= bound * size).all())


class Odd:
    """An object of no kind that anything takes."""

    def __repr__(self) -> str:
        return "Odd()"


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, -1.5, 1e300, math.inf, math.nan),
    *("", "x", "layer", "atb", "all", "atb.atb", "\0", "\ud83d", "é" * 50, "[red]", "\x1b[31m", "../x", "0", "nan"),
    *(b"", b"layer", [], [0], [None], ["layer"], ["layer", 3], [[0]], (), (0, 1), (None,), {}, {"a": 1}, set(), {0}),
    *(slice(None), slice(9, 1), slice(None, None, -1), range(0), range(3), 1j, Odd(), object, print, ...),
    *(torch.zeros(()), torch.zeros(0), torch.ones(3), torch.tensor([0, 1]), torch.full((2, 2), math.nan)),
    *(torch.float16, torch.int32, torch.float64, torch.device("cpu"), nn.Linear(1, 1)),
)

odd = st.sampled_from(ODD)


@st.composite
def mostly(draw: Any, usual: Any, *others: Any) -> Any:
    """What is usual four times of five: a call with several arguments then gets past the checks of most of them."""
    return draw(usual if draw(st.sampled_from([True] * 4 + [False])) else st.one_of(*others))
