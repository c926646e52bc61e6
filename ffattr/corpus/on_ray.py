"""Workers that are Ray actors: on this machine, or on the cluster that ``RAY_ADDRESS`` names. All see the same files.

Ray Core alone, and of it little: an actor that died is replaced here, not by Ray (``max_restarts=0``: calls to an actor
that Ray is restarting fail at once), and only numbers of shards are handed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .local import carry_error
from .shards import Done, ShardWorker
from .supervise import Died, Event, Failed, Finished, Ready

__all__ = ["RayActors"]


class RayActors:
    """An `Engine` of ``slots`` actors (None: as many as the cluster has room for) of ``threads`` cores each, with a GPU
    where there are any, which compute by what ``worker`` makes. Raises ValueError where Ray is not installed."""

    def __init__(
        self, folder: Path, slots: int | None, threads: int, worker: Callable[[Path], ShardWorker] = ShardWorker
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("--engine ray needs Ray: pip install 'ffattr[ray]'") from None
        self._ray: Any = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        self.slots = slots or gpus or max(1, int(there.get("CPU", 1)) // threads)
        needs = {"num_cpus": threads, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
        self._actor = ray.remote(_Actor).options(**needs)
        self.folder, self.worker = folder, worker
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}

    def start(self, slot: int) -> None:
        self._actors[slot] = self._actor.remote(self.folder.absolute(), self.worker)
        self._calls[self._actors[slot].load.remote()] = slot

    def submit(self, slot: int, shard: int) -> None:
        self._calls[self._actors[slot].compute.remote(shard)] = slot

    def wait(self, seconds: float) -> list[Event]:
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        events = [self._read_call(call, self._calls.pop(call)) for call in ready]
        died = {event.slot for event in events if isinstance(event, Died)}
        self._calls = {call: slot for call, slot in self._calls.items() if slot not in died}
        return events

    def stop(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors, self._calls = {}, {}
        if self._mine:
            self._ray.shutdown()

    def _read_call(self, call: Any, slot: int) -> Event:
        try:
            found = self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            return Died(slot, str(error).splitlines()[0])
        if isinstance(found, BaseException):
            return Failed(slot, found)
        return Ready(slot) if found is None else Finished(slot, found)


class _Actor:
    """Loads the model when it is told to, not when it is made: an error is then returned like any other."""

    def __init__(self, folder: Path, make: Callable[[Path], ShardWorker]) -> None:
        self.folder, self.make = folder, make
        self.worker: ShardWorker | None = None

    def load(self) -> BaseException | None:
        try:
            self.worker = self.make(self.folder)
        except Exception as error:
            return carry_error(error)
        return None

    def compute(self, shard: int) -> Done | BaseException:
        assert self.worker is not None
        try:
            return self.worker.compute(shard)
        except Exception as error:
            return carry_error(error)
