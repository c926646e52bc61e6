"""Which worker gets which shard, and what happens when one dies: the same whatever the workers are.

An `Engine` starts workers and says what becomes of them. Nothing but numbers of shards goes to a worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .shards import Done

__all__ = ["Died", "Engine", "Event", "Failed", "Finished", "Progressed", "Ready", "supervise"]

_MOST_STARTS = 5
"""Times that one worker after the other may end before its model is loaded."""


@dataclass(frozen=True)
class Ready:
    """The worker in this slot has loaded the model."""

    slot: int


@dataclass(frozen=True)
class Progressed:
    """The worker has computed so many documents and tokens more, of a shard that is not done yet."""

    slot: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """The worker's shard is done."""

    slot: int
    done: Done


@dataclass(frozen=True)
class Failed:
    """The worker raised ``error``, for which no document is to blame."""

    slot: int
    error: BaseException


@dataclass(frozen=True)
class Died:
    """The worker ended; ``how`` says what is known of it."""

    slot: int
    how: str


Event = Ready | Progressed | Finished | Failed | Died


class Engine(Protocol):
    """Runs workers in numbered slots."""

    slots: int

    def start(self, slot: int) -> None:
        """Starts a worker, in the place of one that died."""

    def submit(self, slot: int, shard: int) -> None:
        """Gives the worker a shard."""

    def wait(self, seconds: float) -> Sequence[Event]:
        """Returns what happened, after so many seconds at the latest."""

    def stop(self) -> None:
        """Ends all workers; what they were at is not held against its documents."""


def supervise(engine: Engine, shards: Iterable[int], listen: Callable[[Event | None], None]) -> None:
    """Has all shards computed. ``listen`` hears of every event, and with None that none came for a second.

    Raises what a worker raised, and RuntimeError where workers end before they have begun.
    """
    waiting = deque(shards)
    working: dict[int, int] = {}
    starts = 0

    def hand_out(slot: int) -> None:
        if waiting:
            working[slot] = waiting.popleft()
            engine.submit(slot, working[slot])

    try:
        for slot in range(min(engine.slots, len(waiting))):
            engine.start(slot)
            hand_out(slot)
        while working:
            events = engine.wait(1.0)
            if not events:
                listen(None)
            for event in events:
                listen(event)
                match event:
                    case Ready():
                        starts = 0
                    case Finished(slot):
                        starts = 0
                        del working[slot]
                        hand_out(slot)
                    case Failed(_, error):
                        raise error
                    case Died(slot, how) if slot in working:
                        starts += 1
                        if starts > _MOST_STARTS * engine.slots:
                            raise RuntimeError(f"workers end before they have loaded the model: {how}")
                        engine.start(slot)
                        engine.submit(slot, working[slot])
    finally:
        engine.stop()
