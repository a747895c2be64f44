"""The core waits no longer than until something is due, whatever else does not happen, and then says so."""

from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.engine_core import EngineCore
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.results import Traffic
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Topology

CONFIG = EngineConfig(Topology.parse("both=1"), max_model_len=64, page_size=4)
POOL = PoolSize((32,), (1,), 0)


class Clock:
    """Time passes only while the core waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def inbox_on(clock):
    """A class of inboxes in which a wait with a time-out takes exactly so long, and notes it."""

    class Inbox(SimpleQueue):
        waits: ClassVar = []

        def get(self, block=True, timeout=None):
            if timeout is None:
                return super().get(block)
            self.waits.append(timeout)
            if self.empty():
                clock.now += timeout
                raise Empty
            return super().get()

    return Inbox


class Stuck:
    """An executor whose devices never give a result."""

    traffic = Traffic()

    def flush(self):
        pass

    def perform(self, command):
        pass

    def close(self):
        pass


class Sink:
    def __init__(self):
        self.updates = SimpleQueue()

    def put(self, update):
        self.updates.put(update)


def submission(id_, **service):
    facts = RequestFacts(id_, 3, 5, service=Service(**service))
    return Submission(0.0, facts, np.array([1, 2, 3], np.int32), SamplingPlan(0.0, 1), frozenset(), None, Sink())


@pytest.fixture
def core_and_waits():
    clock = Clock()
    inbox = inbox_on(clock)
    with patch("twinmesh.engine.core.engine_core.SimpleQueue", inbox):
        compilations = SimpleNamespace(count=0, coming=(), close=lambda: None)
        core = EngineCore(Scheduler(CONFIG, [POOL]), lambda post: Stuck(), clock, compilations)
    yield core, inbox.waits
    core.close()


def test_a_stuck_engine_ends_requests_on_time(core_and_waits):
    core, waits = core_and_waits
    late, soon = submission(0, deadline=30.0), submission(1, first_token_deadline=10.0)
    core.submit([late, soon])
    for request, t in ((soon, 10.0), (late, 30.0)):
        update = request.sink.updates.get(timeout=60)
        assert (update.finish_reason, update.token_ids, update.error) == ("deadline", [], None)
        assert update.timeline.finish == t
    assert waits == [10.0, 20.0]


def test_requests_that_missed_their_deadline_are_counted_apart_from_errors(core_and_waits):
    core, _ = core_and_waits
    request = submission(0, deadline=30.0)
    core.submit([request])
    request.sink.updates.get(timeout=60)
    metrics = core.metrics()
    assert metrics.requests == {"deadline": 1}
    assert metrics.latencies.ttft is None


def test_what_is_due_in_years_is_waited_for_piece_by_piece(core_and_waits):
    core, waits = core_and_waits
    request = submission(0, deadline=9000.0)
    core.submit([request])
    assert request.sink.updates.get(timeout=60).timeline.finish == 9000.0
    assert waits == [3600.0, 3600.0, 1800.0]


def test_no_deadline_is_too_far_off_to_be_waited_for():
    compilations = SimpleNamespace(count=0, coming=(), close=lambda: None)
    core = EngineCore(Scheduler(CONFIG, [POOL]), lambda post: Stuck(), lambda: 0.0, compilations)
    core.submit([submission(0, deadline=1e300), submission(1, first_token_deadline=1e10)])
    core.inspect(lambda *_: None)
    core.inspect(lambda *_: None)  # it has waited meanwhile
    core.close()
