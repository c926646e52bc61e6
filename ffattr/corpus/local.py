"""Workers that are processes of this machine, each at the other end of a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from .shards import ShardWorker
from .supervise import Died, Event, Failed, Finished, Progressed, Ready

__all__ = ["LocalProcesses", "carry_error", "count_cores"]

_IMPORTS = [
    *("ffattr.corpus.shards", "pandas", "transformers.modeling_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
]
"""What takes longer to import than a small model takes to load."""
_PATIENCE = 10.0  # seconds that a worker has to leave its journal in order
_MOST_TRIES = 5  # times that one process is begun
_PAUSE = 0.2  # seconds before the next try: a process that was killed is not gone at once


class LocalProcesses:
    """An `Engine` of ``slots`` processes, each of which ends when this process does. Each begins with ``target``.

    Where there are several GPUs, they take turns."""

    def __init__(self, folder: Path, slots: int, target: Callable[..., None] | None = None) -> None:
        self.folder, self.slots, self.target = folder, slots, target or work
        self._gpus = _list_gpus()
        self._context = _make_context()
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Any] = {}

    def start(self, slot: int) -> None:
        """Starts a worker. Where the server that forks it is killed meanwhile, the next try starts another server.

        Raises RuntimeError where no try comes to a process.
        """
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        for attempt in range(1, _MOST_TRIES + 1):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=self.target, args=(self.folder, slot, theirs, gpu), daemon=True)
            try:
                process.start()
            except (EOFError, OSError) as error:
                ours.close()
                if attempt == _MOST_TRIES:
                    raise RuntimeError(
                        f"no worker could be started, {_MOST_TRIES} times: {type(error).__name__}: {error}. Is there "
                        "enough memory, and room for more processes? Then the same command goes on where it was"
                    ) from error
                time.sleep(_PAUSE)
            else:
                self._processes[slot], self._pipes[slot] = process, ours
                return
            finally:
                theirs.close()

    def submit(self, slot: int, shard: int) -> None:
        with contextlib.suppress(OSError):  # it has died: `wait` will say so
            self._pipes[slot].send(shard)

    def wait(self, seconds: float) -> list[Event]:
        slots: dict[Any, int] = {pipe: slot for slot, pipe in self._pipes.items()}
        events: list[Event] = []
        ready: list[Any] = connection.wait(list(slots), seconds)
        for pipe in ready:
            slot = slots[pipe]
            try:
                events.append(pipe.recv())
            except (EOFError, OSError):
                self._pipes.pop(slot).close()
                self._processes[slot].join()
                events.append(Died(slot, _describe_end(self._processes[slot].exitcode)))
        return events

    def stop(self) -> None:
        for slot in self._pipes:
            self._send_signal(slot, signal.SIGTERM)
        end = time.monotonic() + _PATIENCE
        for slot, pipe in self._pipes.items():
            if not _wait_until_closed(pipe, end):
                self._send_signal(slot, getattr(signal, "SIGKILL", signal.SIGTERM))
                _wait_until_closed(pipe, time.monotonic() + _PATIENCE)
            pipe.close()
        for process in self._processes.values():
            process.join()
        self._processes, self._pipes = {}, {}

    def _send_signal(self, slot: int, number: int) -> None:
        """Sends a worker that has its pipe open a signal, by itself: `Process.kill` does nothing to one whose server
        was killed, as it takes it for ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._processes[slot].pid, number)


def work(folder: Path, slot: int, pipe: Any, gpu: str | None = None) -> None:
    """Computes the shards whose numbers come through the pipe until it is closed; on this GPU alone if one is named."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = ShardWorker(folder)
        pipe.send(Ready(slot))
        while True:
            number = pipe.recv()
            done = worker.compute(number, lambda documents, tokens: pipe.send(Progressed(slot, documents, tokens)))
            pipe.send(Finished(slot, done))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(Failed(slot, carry_error(error)))


def carry_error(error: Exception) -> BaseException:
    """Returns an error that another process can read, with the traceback as a note."""
    try:
        carried: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:
        carried = RuntimeError(f"{type(error).__name__}: {error}")
    if hasattr(carried, "add_note"):  # since Python 3.11
        carried.add_note("".join(traceback.format_exception(error)))
    return carried


def count_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_context() -> Any:
    """Returns what starts processes: forks of a server that has done no more than the imports, which take longer than
    loading a small model; new interpreters where there are no forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def _list_gpus() -> list[str]:
    """Lists the GPUs by what ``CUDA_VISIBLE_DEVICES`` calls them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _wait_until_closed(pipe: Any, end: float) -> bool:
    """Waits until the worker at the other end of the pipe is gone, whatever it still says, at most until the time
    ``end``. Returns whether it is gone."""
    while pipe.poll(max(0.0, end - time.monotonic())):
        try:
            pipe.recv_bytes()
        except (EOFError, OSError):
            return True
    return False


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _describe_end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"the process ended with code {code}"
