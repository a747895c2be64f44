"""How decisions are performed: what an executor has to know before an action, and what an action costs that fails."""

import numpy as np
import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.core.dispatcher import Dispatcher
from twinmesh.engine.core.inspection import Observers
from twinmesh.engine.core.running_request import RunningRequest
from twinmesh.engine.core.running_requests import RunningRequests
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.metrics.counters import HostTime
from twinmesh.engine.paging.block_table import Placement
from twinmesh.engine.protocol.actions import (
    Accept,
    AssignPages,
    Chunk,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from twinmesh.engine.protocol.events import MeshFailed, RequestFacts, TransferFailed
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.topology import Topology

CONFIG = EngineConfig(Topology.parse("prefill=1,decode=2"), max_model_len=64, page_size=4)
PROMPT = np.arange(3, 9, dtype=np.int32)
DENSE = SamplingPlan(0.0, 1, repetition_penalty=1.5)


class Decided:
    """A scheduler that has decided, once, and hears of what fails."""

    def __init__(self):
        self.heard, self.next = [], []

    def actions(self):
        actions, self.next = self.next, []
        return actions

    def on(self, event):
        self.heard.append(event)


class Recorder:
    """An executor that keeps what it performs; actions of some kinds raise instead."""

    def __init__(self):
        self.performed, self.failing = [], ()

    def flush(self):
        pass

    def perform(self, command):
        if isinstance(command, self.failing):
            raise RuntimeError("the device is on fire")
        self.performed.append(command)


class Sink(list):
    def put(self, update):
        self.append(update)


class Setting:
    """A dispatcher over one request."""

    def __init__(self, plan=DENSE):
        self.scheduler, self.executor, self.requests = Decided(), Recorder(), RunningRequests(4)
        self.request, self.sink = Request(RequestFacts(7, len(PROMPT), 20), 0, Timeline(0.0), run=1), Sink()
        submission = Submission(0.0, self.request.facts, PROMPT, plan, frozenset(), None, self.sink)
        self.running = RunningRequest(submission, self.request, CONFIG)
        self.requests.add(self.running)
        self.settled = []
        self.dispatcher = Dispatcher(
            self.scheduler, self.executor, self.requests, Observers(), lambda: 9.0, HostTime(), self.settled.append
        )  # fmt: skip

    def dispatch(self, *actions):
        """Perform these; return what the executor was given."""
        self.executor.performed.clear()
        self.scheduler.next = list(actions)
        self.dispatcher.dispatch()
        return list(self.executor.performed)


def prefill(run=1):
    return Prefill(0, 1, 64, (Chunk(7, run, 0, 0, 6, 0, is_last=True),))


def decode(mesh, kv_len, run=1, step=2):
    return Decode(mesh, step, 8, 1, (DecodeRow(7, run, 0, kv_len),))


def accepted(commands):
    """The tokens of each `Accept`."""
    return [command.generated.tolist() for command in commands if isinstance(command, Accept)]


def place(setting, mesh):
    setting.request.placement = None if mesh is None else Placement(mesh, 0, [])


def test_tokens_are_there_before_each_run_and_where_a_hand_off_has_brought_a_dense_row():
    setting = Setting()
    place(setting, 0)
    assert accepted(setting.dispatch(prefill())) == [[]]
    setting.running.take_token(50)
    place(setting, 1)
    first = setting.dispatch(decode(1, 7))
    assert [type(command) for command in first] == [Accept, Decode]
    assert accepted(first) == [[50]]
    setting.running.take_token(51)
    assert accepted(setting.dispatch(decode(1, 8))) == []
    place(setting, 2)
    assert accepted(setting.dispatch(decode(2, 8))) == [[50, 51]]
    place(setting, 0)
    assert accepted(setting.dispatch(prefill(run=2))) == [[50, 51]]


def test_without_a_dense_row_a_hand_off_needs_no_tokens():
    setting = Setting(SamplingPlan(0.0, 1))
    place(setting, 0)
    setting.dispatch(prefill())
    place(setting, 1)
    assert accepted(setting.dispatch(decode(1, 7))) == []


@pytest.mark.parametrize("way", [[(1, 1), (2, 2)], [(1, 3), (1, 1)], [(2, 1), (1, 4), (2, 2)]])
def test_a_request_that_has_left_again_by_the_same_decisions_has_its_tokens_there_all_the_same(way):
    """What is performed is behind what is decided: a request whose row is dispatched may be on its way elsewhere.

    `way`: meshes, and the tokens read there.
    """
    setting = Setting()
    place(setting, None)  # prefilled and sent by the same decisions
    assert accepted(setting.dispatch(prefill())) == [[]]
    tokens = []
    for mesh, count in way:
        for _ in range(count):
            tokens.append(40 + len(tokens))
            setting.running.take_token(tokens[-1])
        assert accepted(setting.dispatch(decode(mesh, 6 + len(tokens)))) == [tokens]


# ---- failures


def test_a_step_that_raises_costs_its_mesh_and_what_was_decided_for_it():
    setting = Setting()
    place(setting, 0)
    setting.executor.failing = Prefill
    done = setting.dispatch(
        prefill(),
        AssignPages(0, 0, 0, 0, (1,)),
        StartTransfer(3, 1, 0, 0, ((1,),), 1),
        Scatter(2, 0, None, ((1,),)),
        decode(1, 7),
    )
    assert [type(command) for command in done] == [Accept, ResetMesh, AssignPages, DropTransfer, Decode]
    assert [type(event) for event in setting.scheduler.heard] == [MeshFailed, TransferFailed]
    assert "on fire" in setting.scheduler.heard[0].reason


def test_a_transfer_that_raises_costs_nothing_else():
    setting = Setting()
    setting.executor.failing = StartTransfer
    assert setting.dispatch(StartTransfer(3, 1, 0, 0, ((1,),), 1)) == []
    assert [(type(event), event.transfer) for event in setting.scheduler.heard] == [(TransferFailed, 3)]


def test_an_action_of_the_host_alone_that_raises_is_a_bug():
    setting = Setting()
    setting.executor.failing = AssignPages
    with pytest.raises(RuntimeError, match="on fire"):
        setting.dispatch(AssignPages(0, 0, 0, 0, (1,)))


def test_an_end_takes_along_what_was_not_sent_yet():
    setting = Setting()
    setting.running.take_token(50)
    setting.request.timeline.finish = 1.0
    setting.dispatch(Finish(7, "length"))
    assert not setting.requests
    assert not setting.requests.dense
    assert [(update.token_ids, update.finish_reason) for update in setting.sink] == [([50], "length")]
    log, unfinished = setting.requests.figures(2.0)
    assert (dict(log.reasons), unfinished.seen) == ({"length": 1}, [])
