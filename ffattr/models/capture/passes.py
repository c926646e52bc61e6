"""What keeps forward passes apart that run at the same time, in several threads or one inside the other.

Hooks are on modules that all threads share, but act in the pass alone that they were attached in. What is changed for
all of them, such as the attention implementation of a configuration, is changed by the first pass that needs it, and
changed back by the last. A lock is held while this is done, and not while anything of the user's runs.

Everything is undone by an `ExitStack` that is entered twice, ``with ExitStack() as stack, stack:``, because an
interrupt may also come where the inner one is about to begin undoing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

__all__ = ["Hook", "attach_hook", "begin_pass", "find_pass", "leave_pass", "share_change"]

_R = TypeVar("_R")

_running: ContextVar[object | None] = ContextVar("ffattr_pass", default=None)
_lock = threading.RLock()


def find_pass() -> object | None:
    """Returns what stands for the pass that runs here; None inside none, and where the caller has the word again."""
    return _running.get()


@contextmanager
def begin_pass() -> Iterator[None]:
    """Begins a pass: what is attached in here acts in here alone."""
    with ExitStack() as stack, stack:
        stack.callback(_running.reset, _running.set(object()))
        yield


@contextmanager
def leave_pass() -> Iterator[None]:
    """Lets what runs in here be no part of the pass: a callback of the user's, which may begin one of its own."""
    with ExitStack() as stack, stack:
        stack.callback(_running.reset, _running.set(None))
        yield


class Hook:
    """A hook of the pass in which it is made; in any other one, and in none, it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._pass = find_pass()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs) if find_pass() is self._pass else None


def attach_hook(stack: ExitStack, register: Callable[..., Any], function: Callable[..., Any], **options: Any) -> None:
    """Registers a `Hook` by a method of a module, ``register``, and has ``stack`` remove it.

    One thread at a time: torch numbers hooks by counting.
    """
    _run_locked(lambda: stack.callback(register(Hook(function), **options).remove))


@dataclass
class _Change:
    """A change that all threads see, and the passes that need it, each with its thread."""

    undo: ExitStack = field(default_factory=ExitStack)
    users: dict[object, int] = field(default_factory=dict)


_changes: dict[Hashable, _Change] = {}


@contextmanager
def share_change(key: Hashable, make: Callable[[ExitStack], None]) -> Iterator[None]:
    """Has a change in place that goes by ``key``. ``make`` makes it, with what undoes it on the stack before."""
    user = object()
    with ExitStack() as stack, stack:
        for _ in range(2):  # should the first be interrupted
            stack.callback(_run_locked, partial(_leave_change, key, user))
        _run_locked(partial(_enter_change, key, user, make))
        yield


def _enter_change(key: Hashable, user: object, make: Callable[[ExitStack], None]) -> None:
    change = _changes.setdefault(key, _Change())
    if not change.users:
        make(change.undo)
    change.users[user] = threading.get_ident()


def _leave_change(key: Hashable, user: object) -> None:
    change = _changes.get(key)
    if change is None:
        return
    change.users.pop(user, None)
    if not change.users:
        change.undo.close()
        _changes.pop(key, None)


def _run_locked(act: Callable[[], _R]) -> _R:
    with ExitStack() as stack, stack:
        stack.enter_context(_lock)
        return act()


def _forget_other_threads() -> None:
    """Undoes in a forked process what passes of threads need that it does not have; it holds the lock."""
    own = threading.get_ident()
    for key, change in list(_changes.items()):
        for user in [user for user, thread in change.users.items() if thread != own]:
            _leave_change(key, user)
    _lock.release()


if hasattr(os, "register_at_fork"):  # no thread is within a change when a process forks
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_other_threads)
