"""A crew starts workers in phases, misses those that die or fall silent, starts them again, and gives up in the end.

Workers of the backend answer within the call that sends to them. No clock runs but where one is to be missed.
"""

import re
import threading
from collections import deque

import numpy as np
import pytest
from twinmesh.engine.errors import EngineError
from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.actions import (
    Accept,
    AllowTokens,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from twinmesh.engine.protocol.events import MeshJoined, TransferFailed, TransferReady
from twinmesh.engine.protocol.offers import KVOffer
from twinmesh.engine.protocol.results import MeshLost, StepFailed
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.worker import (
    UNTOLD,
    Alive,
    Beat,
    Checked,
    Fetch,
    Load,
    MasksPrepared,
    NewParams,
    Offered,
    Place,
    Posted,
    Prepare,
    PrepareMasks,
    Refused,
    Serving,
    Turn,
    Withdraw,
)
from twinmesh.engine.worker.remote import crew_member
from twinmesh.engine.worker.remote.crew import Crew
from twinmesh.engine.worker.remote.crew_member import MOST_TRIES, Stage
from twinmesh.engine.worker.remote.remote_executor import RemoteExecutor

LONG = 60.0
OFFER = KVOffer("memory", 5, "here", 100, ())
PROMPT = np.arange(4, dtype=np.int32)


class FakeWorker:
    """One start of a worker: it answers the driver's messages by `plan`, and the test says the rest."""

    def __init__(self, epoch, received, ended, plan):
        self.epoch, self._received, self._ended, self.plan = epoch, received, ended, plan
        self.sent, self.is_dead, self.asked = [], False, threading.Condition()

    def send(self, data):
        message = wire.decode_to_worker(data)
        if isinstance(message, Beat):
            if "silent" not in self.plan:
                self.say(Alive(self.epoch, message.number))
            return
        with self.asked:
            self.sent.append(message)
            self.asked.notify_all()
        if isinstance(message, Prepare):
            self.say(self.plan.get("check", lambda epoch: Checked(epoch, b"found"))(self.epoch))
        elif isinstance(message, Load):
            self.say(self.plan.get("load", Serving)(self.epoch))
        elif isinstance(message, PrepareMasks) and (answer := self.plan.get("masks", MasksPrepared)) is not None:
            self.say(answer(self.epoch))

    def say(self, message):
        self.say_bytes(wire.encode(message))

    def say_bytes(self, data):
        self._received(data)

    def die(self, why="it was ended by SIGKILL."):
        self.is_dead = True
        self._ended(why)

    def kill(self):
        self.is_dead = True

    def of(self, *kinds):
        return [message for message in self.sent if isinstance(message, kinds)]

    @property
    def commands(self):
        return [command for turn in self.of(Turn) for command in turn.commands]


class FakeBackend:
    def __init__(self, plans=({}, {})):
        self.places = [Place((mesh,), (0, 1)) for mesh in range(len(plans))]
        self.plans, self.started, self.is_closed = [dict(plan) for plan in plans], [[] for _ in plans], False
        self.all_started, self._started = threading.Event(), threading.Condition()

    def wait_for_start(self, worker, count):
        with self._started:
            assert self._started.wait_for(lambda: len(self.started[worker]) >= count, LONG)

    def name(self, worker):
        return f"worker {worker}"

    def start(self, worker, epoch, received, ended):
        made = FakeWorker(epoch, received, ended, self.plans[worker])
        with self._started:
            self.started[worker].append(made)
            self._started.notify_all()
        if all(self.started):
            self.all_started.set()
        return made

    def close(self):
        self.is_closed = True

    def last(self, worker):
        return self.started[worker][-1]


class Inbox:
    """What the core would take in."""

    def __init__(self):
        self.messages, self._changed = deque(), threading.Condition()

    def put(self, message):
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def wait_for(self, kind):
        def find():
            return next((message for message in self.messages if isinstance(message, kind)), None)

        with self._changed:
            assert self._changed.wait_for(find, LONG)
            found = find()
            self.messages.remove(found)
            return found


class Running:
    """A crew that serves, and the executor over it."""

    def __init__(self, timeout=LONG, why_over=lambda gone: None):
        self.backend, self.inbox, self.now = FakeBackend(), Inbox(), 100.0
        self.crew = Crew(self.backend, [b"asked"] * 2, self.clock, timeout)
        self.crew.check()
        self.crew.load(b"agreed", lambda worker, found: None)
        self.executor = RemoteExecutor(self.crew, self.inbox.put, self.clock, lambda new: None, why_over)
        self.first, self.second = (self.backend.last(worker) for worker in (0, 1))

    def clock(self):
        return self.now

    def perform(self, *commands):
        for command in commands:
            self.executor.perform(command)
        self.executor.flush()


@pytest.fixture
def running(monkeypatch):
    monkeypatch.setattr(crew_member, "FIRST_PAUSE", 0.0)
    made = []

    def make(**options):
        made.append(Running(**options))
        return made[-1]

    yield make
    for one in made:
        one.executor.close()
        assert one.backend.is_closed


def step(mesh, *ids):
    return Decode(mesh, 7, 4, 1, tuple(DecodeRow(id_, 1, slot, 9) for slot, id_ in enumerate(ids)))


def accept(id_):
    return Accept(id_, PROMPT, SamplingPlan(0.0, 1), PROMPT[:0])


# ---- the start


@pytest.mark.parametrize("is_told", [True, False])
def test_a_worker_that_refuses_ends_the_start_in_a_sentence_that_names_it(is_told):
    why = "/models/tiny does not exist: fetch it there."
    refuses = {"check": lambda epoch: Refused(epoch if is_told else UNTOLD, why)}
    crew = Crew(FakeBackend(({}, refuses)), [b""] * 2, lambda: 0.0, LONG)
    with pytest.raises(ValueError, match=r"^worker 1 cannot serve: /models/tiny does not exist: fetch it there\.$"):
        crew.check()
    crew.close()


def test_nothing_loads_before_all_have_checked():
    waits = {"check": lambda epoch: Alive(epoch, 0)}
    backend = FakeBackend(({}, waits))
    crew = Crew(backend, [b""] * 2, lambda: 0.0, LONG)
    checking = threading.Thread(target=crew.check)
    checking.start()
    assert backend.all_started.wait(LONG)
    assert not backend.last(0).of(Load)
    backend.last(1).say(Checked(backend.last(1).epoch, b"found"))
    checking.join(LONG)
    crew.load(b"agreed", lambda worker, found: None)
    assert all(backend.last(worker).of(Load)[0].agreed == b"agreed" for worker in (0, 1))
    crew.close()


# ---- commands


def test_a_turn_is_one_message_to_each_worker_and_brings_what_it_needs_of_requests_once(running):
    one = running()
    one.perform(accept(3), accept(4), step(0, 3, 4), step(1, 4))
    assert [type(message) for message in one.first.sent] == [Prepare, Load, Turn]
    assert [type(command) for command in one.first.commands] == [Accept, Accept, Decode]
    assert [getattr(command, "request_id", None) for command in one.second.commands] == [4, None]
    one.perform(step(0, 3, 4), step(1, 4), Finish(3, "stop"))
    assert [type(command) for command in one.first.commands[3:]] == [Decode, Finish]
    assert [type(command) for command in one.second.commands[2:]] == [Decode]
    assert list(one.executor.records) == [4]


def test_times_of_a_worker_are_as_old_as_they_were_when_they_were_sent(running):
    one = running()
    one.first.say(Posted(one.first.epoch, 5.0, (StepFailed(4.5, 0, 3, "boom"),)))
    assert one.inbox.wait_for(StepFailed).t == 99.5


# ---- losses


def test_a_worker_that_dies_is_lost_with_its_mesh_and_joins_again_empty(running):
    one = running()
    one.executor.replace_params({"w": np.zeros(2, np.float32)})
    one.executor.perform(accept(3))
    one.perform(step(1, 3))
    one.second.die()
    lost = one.inbox.wait_for(MeshLost)
    assert (lost.mesh, lost.is_gone) == (1, True)
    assert lost.reason == "worker 1 of mesh 1 was lost: it was ended by SIGKILL."
    assert one.crew.wait_until_it_serves(1, one.second.epoch, LONG)
    assert one.inbox.wait_for(MeshJoined).mesh == 1
    again = one.backend.last(1)
    assert [type(message) for message in again.sent] == [Prepare, Load, NewParams]
    one.perform(step(1, 3))  # decided before the loss was known
    assert not again.commands
    one.perform(ResetMesh(1), step(1, 3))
    assert [type(command) for command in again.commands] == [ResetMesh, Accept, Decode]


def test_what_an_earlier_epoch_sends_late_is_refused(running):
    one = running()
    one.second.die()
    assert one.crew.wait_until_it_serves(1, one.second.epoch, LONG)
    one.inbox.messages.clear()
    one.second.say(Posted(one.second.epoch, 0.0, (StepFailed(0.0, 1, 3, "late"),)))
    again = one.backend.last(1)
    again.say(Posted(one.second.epoch, 0.0, (StepFailed(0.0, 1, 3, "late"),)))
    assert not any(isinstance(message, StepFailed) for message in one.inbox.messages)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (lambda epoch: b"\x09nonsense", "what it sent could not be read: .* is of version 9"),
        (lambda epoch: wire.encode(Posted(epoch, 0.0, (StepFailed(0.0, 0, 3, "boom"),))), "it spoke for mesh 0"),
    ],
)
def test_a_worker_that_sends_what_cannot_be_is_ended_and_leaves_no_transfer_behind(running, sent, why):
    one = running()
    begin(one)
    one.first.say(Offered(one.first.epoch, 8, OFFER))
    one.second.say_bytes(sent(one.second.epoch))
    lost = one.inbox.wait_for(MeshLost)
    assert (lost.mesh, lost.is_gone) == (1, True)
    assert re.match(f"worker 1 of mesh 1 was lost: {why}", lost.reason)
    assert one.second.is_dead
    assert one.inbox.wait_for(TransferFailed).transfer == 8
    assert one.first.of(Withdraw)
    assert not one.executor.num_staged
    assert one.crew.wait_until_it_serves(1, one.second.epoch, LONG)


def test_a_worker_that_says_twice_that_it_serves_joins_once(running):
    one = running()
    one.backend.plans[1] = {"load": lambda epoch: Alive(epoch, 0)}
    one.second.die()
    one.backend.wait_for_start(1, 2)
    slow = one.backend.last(1)
    with slow.asked:
        assert slow.asked.wait_for(lambda: slow.of(Load), LONG)
    assert not any(isinstance(message, MeshJoined) for message in one.inbox.messages)
    slow.say(Checked(slow.epoch, b"found"))  # once more
    assert one.crew.stage(1) is Stage.LOADING
    slow.say(Serving(slow.epoch))
    slow.say(Serving(slow.epoch))
    assert one.inbox.wait_for(MeshJoined).mesh == 1
    assert not any(isinstance(message, MeshJoined) for message in one.inbox.messages)


def test_a_worker_that_is_silent_is_killed_and_replaced_and_one_that_answers_is_not():
    backend, inbox = FakeBackend(({}, {"silent": True})), Inbox()
    now = [0.0]
    crew = Crew(backend, [b""] * 2, lambda: now[0], 0.05)
    crew.check()
    crew.load(b"", lambda worker, found: None)
    RemoteExecutor(crew, inbox.put, lambda: now[0], lambda new: None, lambda gone: None)
    silent = backend.last(1)

    def pass_time():
        while not silent.is_dead and not done.wait(0.005):
            now[0] += 0.002

    done = threading.Event()
    thread = threading.Thread(target=pass_time)
    thread.start()
    lost = inbox.wait_for(MeshLost)
    done.set()
    thread.join()
    assert lost.mesh == 1
    assert "worker 1 was silent for" in lost.reason
    assert silent.is_dead
    assert len(backend.started[0]) == 1
    crew.close()


def test_a_worker_that_never_comes_back_ends_an_engine_that_needs_it(running):
    one = running(why_over=lambda gone: "no mesh is left to decode" if gone == {1} else None)
    one.backend.plans[1] = {"check": lambda epoch: Refused(epoch, "its disk is gone.")}
    one.second.die()
    assert not one.crew.wait_until_it_serves(1, one.second.epoch, LONG)
    assert one.crew.stage(1) is Stage.GIVEN_UP
    assert len(one.backend.started[1]) == 1 + MOST_TRIES
    with pytest.raises(
        RuntimeError, match=r"^no mesh is left to decode since worker 1 could not be started again: its disk is gone\.$"
    ):
        one.perform(ResetMesh(1))


# ---- programs for masks


def in_thread(work):
    """Call `work` on a thread, and return it with what it raised, None while it runs."""
    raised = []

    def run():
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_programs_for_masks_are_asked_for_once_and_waited_for(running):
    one = running()
    one.backend.plans[1]["masks"] = None
    thread, raised = in_thread(one.crew.prepare_masks)
    with one.second.asked:
        assert one.second.asked.wait_for(lambda: one.second.of(PrepareMasks), LONG)
    assert thread.is_alive()
    one.second.say(MasksPrepared(one.second.epoch))
    thread.join(LONG)
    assert not raised
    one.crew.prepare_masks()
    assert [worker.of(PrepareMasks) for worker in (one.first, one.second)] == [
        [PrepareMasks(one.first.epoch)],
        [PrepareMasks(one.second.epoch)],
    ]
    one.perform(accept(3), AllowTokens(1, 7, (3,), np.zeros((1, 2), np.int32)), step(1, 3))
    assert [type(command) for command in one.second.commands] == [AllowTokens, Accept, Decode]
    assert not one.first.commands


def test_a_worker_that_is_started_again_has_them_before_it_joins(running):
    one = running()
    one.crew.prepare_masks()
    one.backend.plans[1]["masks"] = None
    one.second.die()
    one.backend.wait_for_start(1, 2)
    again = one.backend.last(1)
    with again.asked:
        assert again.asked.wait_for(lambda: again.of(PrepareMasks), LONG)
    assert one.crew.stage(1) is Stage.LOADING
    one.crew.prepare_masks()  # whoever needs them now does not wait for a worker that is away
    assert not any(isinstance(message, MeshJoined) for message in one.inbox.messages)
    again.say(MasksPrepared(again.epoch))
    assert one.inbox.wait_for(MeshJoined).mesh == 1
    assert len(again.of(PrepareMasks)) == 1


def test_a_worker_that_cannot_compile_them_is_named_in_a_sentence_and_asked_again_the_next_time(running):
    one = running()
    one.backend.plans[1]["masks"] = lambda epoch: MasksPrepared(epoch, "MemoryError: the device is full")
    for asked in (1, 2):
        with pytest.raises(
            EngineError,
            match=r"^worker 1 could not compile what structured outputs need: MemoryError: the device is full$",
        ):
            one.crew.prepare_masks()
        assert len(one.second.of(PrepareMasks)) == asked
    assert one.crew.stage(1) is Stage.SERVING
    del one.backend.plans[1]["masks"]
    one.crew.prepare_masks()
    assert [len(worker.of(PrepareMasks)) for worker in (one.first, one.second)] == [1, 3]


def test_a_worker_that_cannot_compile_them_when_it_is_started_again_does_not_join(running):
    one = running()
    one.crew.prepare_masks()
    one.backend.plans[1]["masks"] = lambda epoch: MasksPrepared(epoch, "MemoryError: the device is full")
    one.second.die()
    assert not one.crew.wait_until_it_serves(1, one.second.epoch, LONG)
    assert len(one.backend.started[1]) == 1 + MOST_TRIES
    reasons = [message.reason for message in one.inbox.messages if isinstance(message, MeshLost)]
    assert "it could not compile what structured outputs need: MemoryError: the device is full" in reasons


def test_a_worker_that_is_lost_meanwhile_is_not_waited_for(running):
    one = running()
    one.backend.plans[1]["masks"] = None
    thread, raised = in_thread(one.crew.prepare_masks)
    with one.second.asked:
        assert one.second.asked.wait_for(lambda: one.second.of(PrepareMasks), LONG)
    one.second.die()
    thread.join(LONG)
    assert not thread.is_alive()
    assert not raised


def test_a_crew_that_is_closed_keeps_nobody_waiting(running):
    one = running()
    one.backend.plans[1]["masks"] = None
    thread, raised = in_thread(one.crew.prepare_masks)
    with one.second.asked:
        assert one.second.asked.wait_for(lambda: one.second.of(PrepareMasks), LONG)
    one.crew.close()
    thread.join(LONG)
    assert not thread.is_alive()
    assert not raised


# ---- transfers


def begin(one, number=8):
    one.perform(StartTransfer(number, 4, 0, 1, ((1, 2),), 1))


def test_a_transfer_goes_from_offer_to_fetch_and_the_source_lets_go_when_it_has_arrived(running):
    one = running()
    begin(one)
    one.first.say(Offered(one.first.epoch, 8, OFFER))
    (fetch,) = one.second.of(Fetch)
    assert (fetch.transfer, fetch.source, fetch.destination, fetch.bucket, fetch.offer) == (8, 0, 1, 4, OFFER)
    one.second.say(Posted(one.second.epoch, 0.0, (TransferReady(0.0, 8),)))
    assert one.inbox.wait_for(TransferReady).transfer == 8
    assert one.first.of(Withdraw) == [Withdraw(one.first.epoch, 8, True)]
    assert one.executor.traffic.links[0, 1].bytes == 100
    one.perform(Scatter(8, 1, 0, ((3, 4),)))
    assert not one.executor.num_staged


def test_a_fetch_that_fails_costs_the_transfer_alone(running):
    one = running()
    begin(one)
    one.first.say(Offered(one.first.epoch, 8, OFFER))
    one.second.say(Posted(one.second.epoch, 0.0, (TransferFailed(0.0, 8, "the time was over."),)))
    assert one.inbox.wait_for(TransferFailed).reason == "the time was over."
    assert one.first.of(Withdraw) == [Withdraw(one.first.epoch, 8, False)]
    assert not one.executor.num_staged


def test_a_transfer_that_nobody_needs_any_more_is_withdrawn_when_it_is_offered(running):
    one = running()
    begin(one)
    one.perform(DropTransfer(8))
    one.first.say(Offered(one.first.epoch, 8, OFFER))
    assert one.inbox.wait_for(TransferFailed).transfer == 8
    assert one.first.of(Withdraw)
    assert not one.second.of(Fetch)
    assert not one.executor.num_staged


@pytest.mark.parametrize("is_offered", [False, True])
def test_a_transfer_to_a_worker_that_is_lost_fails_after_its_mesh_is_known_to_be(running, is_offered):
    one = running()
    begin(one)
    if is_offered:
        one.first.say(Offered(one.first.epoch, 8, OFFER))
    one.second.die()
    one.inbox.wait_for(MeshLost)
    if not is_offered:
        assert not any(isinstance(message, TransferFailed) for message in one.inbox.messages)
        one.first.say(Offered(one.first.epoch, 8, OFFER))
    assert one.inbox.wait_for(TransferFailed).transfer == 8
    assert one.first.of(Withdraw)
    assert not one.executor.num_staged


def test_what_a_lost_source_had_offered_is_dropped_where_it_was_to_arrive(running):
    one = running()
    begin(one)
    one.first.say(Offered(one.first.epoch, 8, OFFER))
    one.first.die()
    assert one.inbox.wait_for(MeshLost).mesh == 0
    assert one.second.commands == [DropTransfer(8)]
    one.second.say(Posted(one.second.epoch, 0.0, (TransferReady(0.0, 8),)))
    assert not any(isinstance(message, TransferReady) for message in one.inbox.messages)
    assert not one.executor.num_staged
