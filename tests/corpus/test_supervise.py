"""Shards are handed out, those of dead workers again, and what is to blame for nothing ends the run."""

import pytest

from ffattr.corpus.shards import Done
from ffattr.corpus.supervise import Died, Failed, Finished, Ready, supervise


class Script:
    """An engine whose workers die as often as ``deaths`` says of a shard, and fail at those of ``failing``."""

    def __init__(self, slots=2, deaths=(), failing=(), dead_on_arrival=False):
        self.slots, self.deaths, self.failing = slots, dict(deaths), failing
        self.dead_on_arrival, self.stopped = dead_on_arrival, False
        self.started, self.computed, self.events = [], [], []

    def start(self, slot):
        self.started.append(slot)
        if not self.dead_on_arrival:
            self.events.append(Ready(slot))

    def submit(self, slot, shard):
        if self.dead_on_arrival or self.deaths.get(shard, 0) > 0:
            self.deaths[shard] = self.deaths.get(shard, 0) - 1
            self.events.append(Died(slot, "signal 9"))
        elif shard in self.failing:
            self.events.append(Failed(slot, OSError("disk full")))
        else:
            self.computed.append(shard)
            self.events.append(Finished(slot, Done(shard, 1, 1, 0, 0)))

    def wait(self, seconds):
        events, self.events = self.events[:1], self.events[1:]
        return events

    def stop(self):
        self.stopped = True


def test_every_shard_once_by_as_many_workers_as_are_of_use():
    engine, heard = Script(slots=3), []
    supervise(engine, [4, 7], heard.append)
    assert engine.computed == [4, 7]
    assert engine.started == [0, 1]
    assert engine.stopped
    assert [event.done.shard for event in heard if isinstance(event, Finished)] == [4, 7]


def test_a_dead_worker_is_replaced_and_its_shard_done():
    engine = Script(deaths={1: 12, 3: 1})
    supervise(engine, range(5), lambda event: None)
    assert sorted(engine.computed) == [0, 1, 2, 3, 4]
    assert len(engine.started) == 2 + 13


def test_an_error_ends_the_run():
    engine = Script(failing=[2])
    with pytest.raises(OSError, match="disk full"):
        supervise(engine, range(9), lambda event: None)
    assert engine.stopped
    assert len(engine.computed) < 9


def test_workers_that_never_begin_end_the_run():
    engine = Script(slots=1, dead_on_arrival=True)
    with pytest.raises(RuntimeError, match="end before they have loaded the model: signal 9"):
        supervise(engine, [0], lambda event: None)
    assert len(engine.started) == 6


def test_ctrl_c_stops_the_workers():
    engine = Script()

    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(engine, [0], interrupt)
    assert engine.stopped
