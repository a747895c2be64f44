"""Calls of `set_roles` and `update_params` on a core whose device never answers: who waits for whom, how each ends."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.changes import Change
from twinmesh.engine.core.engine_core import EngineCore
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.errors import EngineError
from twinmesh.engine.protocol.actions import RolesSettled
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.results import Traffic
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Role, Topology

FOREVER = 1e6  # seconds


@pytest.fixture(autouse=True)
def prompts_go_to_meshes_that_prefill(monkeypatch):
    """The request begins on the mesh that does both, not on the decode mesh, which has no answers to keep waiting."""
    monkeypatch.setattr("twinmesh.engine.scheduler.router.with_decode_meshes", lambda request, ranked, decodes: ranked)


class Idle:
    """An executor that keeps what it is given, and never answers."""

    traffic = Traffic()

    def __init__(self):
        self.performed, self.params = [], []

    def flush(self):
        pass

    def perform(self, command):
        self.performed.append(command)

    def check_params(self, new):
        pass

    def replace_params(self, new):
        self.params.append(new)

    def close(self):
        pass


class Sink(list):
    def put(self, update):
        self.append(update)


class Engine(Observer):
    """A core over a pool, callers on threads of their own, and one request that decodes for ever."""

    def __init__(self):
        config = EngineConfig(
            Topology.parse("pool=2"), max_model_len=64, page_size=4, roles=(Role.BOTH, Role.DECODE),
            prefill_buckets=(16,), decode_buckets=(32,),
        )  # fmt: skip
        self.executor, self.times = Idle(), 0.0
        scheduler = Scheduler(config, [PoolSize((64,), (1,), 64)] * 2)
        scheduler.costs.transfer = lambda *_: FOREVER  # a request is finished rather than moved
        compilations = SimpleNamespace(count=0, coming=(), close=lambda: None)
        self.core = EngineCore(scheduler, lambda post: self.executor, lambda: self.times, compilations)
        self._callers, self._taken, self._observing = ThreadPoolExecutor(8), [], self.core.observe(self)
        self._observing.__enter__()
        facts, plan = RequestFacts(1, 6, 20), SamplingPlan(0.0, 1)
        self.core.submit([Submission(0.0, facts, np.arange(3, 9, dtype=np.int32), plan, frozenset(), None, Sink())])

    def call(self, name, *args):
        """Begin a call on a thread of its own, and let the core take it in."""
        before = self.core.inspect(lambda *_: len(self._taken))
        future = self._callers.submit(getattr(self.core, name), *args)
        while not future.done() and self.core.inspect(lambda *_: len(self._taken)) == before:
            pass
        return future

    def received(self, message):
        if isinstance(message, Change):
            self._taken.append(message)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.core.close()
        self._callers.shutdown()


def test_a_call_returns_when_nothing_is_left_to_drain():
    with Engine() as engine:
        call = engine.call("set_roles", {0: "prefill"}, FOREVER)
        assert not call.done()
        assert engine.core.roles() == ["prefill (draining decode)", "decode"]
        engine.core.abort(1)
        assert call.result(60) == "reached"
        assert engine.core.roles() == ["prefill", "decode"]
        assert engine.core.metrics().roles == ("prefill", "decode")
        assert engine.core.metrics().flips == 1


def test_no_executor_hears_of_roles():
    with Engine() as engine:
        assert engine.call("set_roles", "both=2", FOREVER).result(60) == "reached"
        assert not any(isinstance(command, RolesSettled) for command in engine.executor.performed)


def test_a_later_call_takes_the_place_of_one_that_waits():
    with Engine() as engine:
        earlier = engine.call("set_roles", {0: "prefill"}, FOREVER)
        later = engine.call("set_roles", "both=2", FOREVER)
        assert earlier.result(60) == "superseded"
        assert later.result(60) == "reached"


def test_a_call_whose_time_is_over_says_what_held_it():
    with Engine() as engine:
        call = engine.call("set_roles", {0: "prefill"}, 5.0)
        assert not call.done()
        engine.times = 5.0
        engine.core.inspect(lambda *_: None)  # the loop looks at the clock again
        with pytest.raises(TimeoutError, match=r"mesh 0 still decodes request 1 .*the roles are decode=1,both=1"):
            call.result(60)
        assert engine.core.roles() == ["both", "decode"]


@pytest.mark.parametrize(
    ("roles", "timeout", "sentence"),
    [
        ("prefill=2", 1.0, "leave no mesh to decode"),
        ({0: "decode"}, 1.0, "leave no mesh to prefill: the roles are decode=1,both=1"),
        ({2: "decode"}, 1.0, "mesh 2, which is not in the pool"),
        ("both=2", 0, "drain_timeout=0 is not usable"),
        ("both=2", float("nan"), "drain_timeout=nan is not usable"),
        ("both=2", "soon", "drain_timeout='soon' is not usable"),
    ],
)
def test_what_cannot_be_is_refused(roles, timeout, sentence):
    with Engine() as engine:
        with pytest.raises(ValueError, match=sentence):
            engine.core.set_roles(roles, timeout)
        assert engine.core.roles() == ["both", "decode"]


def test_parameters_wait_for_roles():
    with Engine() as engine:
        roles = engine.call("set_roles", {0: "prefill"}, FOREVER)
        params = engine.call("update_params", {"a": 1})
        assert not engine.core.inspect(lambda scheduler, _: scheduler._admission.is_held)  # noqa: SLF001 (no other sign)
        engine.core.abort(1)
        assert roles.result(60) == "reached"
        params.result(60)
        assert engine.executor.params == [{"a": 1}]


def test_roles_wait_for_parameters_and_begin_after_them():
    with Engine() as engine:
        params = engine.call("update_params", {"a": 1})
        roles = engine.call("set_roles", "both=2", FOREVER)
        assert engine.core.roles() == ["both", "decode"]
        assert not params.done()
        engine.core.abort(1)
        params.result(60)
        assert roles.result(60) == "reached"
        assert engine.core.roles() == ["both", "both"]


def test_roles_wait_for_parameters_no_longer_than_their_own_time():
    with Engine() as engine:
        params = engine.call("update_params", {"a": 1})
        late, other = engine.call("set_roles", {0: "prefill"}, 5.0), engine.call("set_roles", "both=2", FOREVER)
        engine.times = 5.0
        engine.core.inspect(lambda *_: None)  # the loop looks at the clock again
        with pytest.raises(TimeoutError, match=r"new parameters go first.*the roles are decode=1,both=1"):
            late.result(60)
        assert not params.done()
        engine.core.abort(1)
        params.result(60)
        assert other.result(60) == "reached"


def test_changes_begin_in_order():
    """A call for roles does not overtake parameters that wait for an earlier one."""
    with Engine() as engine:
        first = engine.call("set_roles", {0: "prefill"}, FOREVER)
        params = engine.call("update_params", {"a": 1})
        second = engine.call("set_roles", "both=2", FOREVER)
        assert not first.done()
        engine.core.abort(1)
        assert first.result(60) == second.result(60) == "reached"
        params.result(60)


def test_the_end_of_the_engine_ends_every_call():
    with Engine() as engine:
        waiting = [
            engine.call("set_roles", {0: "prefill"}, FOREVER),
            engine.call("update_params", {"a": 1}),
            engine.call("set_roles", "both=2", FOREVER),
        ]
        engine.core.close()
        for call in waiting:
            with pytest.raises(EngineError, match="the engine is closed"):
                call.result(60)
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.core.set_roles("both=2", 1.0)
