"""Several workers of a backend are one to the driver: it hears what holds for all, and they end together."""

import itertools

import numpy as np
import pytest
from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.actions import DropTransfer
from twinmesh.engine.protocol.events import TransferFailed, TransferReady
from twinmesh.engine.protocol.offers import KVOffer, joined
from twinmesh.engine.protocol.results import StepFailed, StepResult
from twinmesh.engine.protocol.worker import (
    Alive,
    Beat,
    Checked,
    MasksPrepared,
    Member,
    Offered,
    Place,
    Posted,
    Prepare,
    PrepareMasks,
    Refused,
    Serving,
    Transferred,
    Turn,
    Withdraw,
)
from twinmesh.engine.worker.remote.groups import Groups
from twinmesh.engine.worker.remote.outbox import MemberOutbox


class FakeWorker:
    def __init__(self, received, ended):
        self.receive, self.end = received, ended
        self.sent, self.kills = [], 0

    def say(self, message):
        self.receive(wire.encode(message))

    def send(self, data):
        self.sent.append(wire.decode_to_worker(data))

    def kill(self):
        self.kills += 1


class FakeBackend:
    """Four workers, two and two with one mesh."""

    def __init__(self, refuses=None):
        self.places = [Place((mesh,), (0, 1)) for mesh in (0, 0, 1, 1)]
        self.started, self._refuses = {}, refuses

    def name(self, worker):
        return f"process {worker}"

    def start(self, worker, epoch, received, ended):
        if worker == self._refuses:
            raise ValueError("no room for it.")
        self.started[worker] = FakeWorker(received, ended)
        return self.started[worker]


class Driver:
    """A group that was started, and what a driver has heard of it."""

    def __init__(self, backend, worker=0, merge=b" ".join):
        numbers = itertools.count(5000)
        self.groups = Groups(backend, 2, lambda first: f"host{first}:{next(numbers)}", merge)
        self.heard, self.ends = [], []
        self.handle = self.groups.start(
            worker, 7, lambda data: self.heard.append(wire.decode_from_worker(data)), self.ends.append
        )
        self.members = [backend.started[2 * worker], backend.started[2 * worker + 1]]


def test_each_group_is_one_worker_where_its_first_member_stands():
    driver = Driver(FakeBackend())
    assert driver.groups.places == [Place((0,), (0, 1)), Place((1,), (0, 1))]
    assert driver.groups.name(1) == "process 2 and process 3"


def test_members_are_sent_the_same_and_each_its_own_place_in_the_group():
    driver = Driver(FakeBackend(), worker=1)
    prepare = Prepare(7, 1, Place((1,), (0, 1)), b"asked")
    driver.handle.send(wire.encode(prepare))
    driver.handle.send(wire.encode(Beat(7, 1)))
    first, second = ([message.member for message in member.sent[:1]] for member in driver.members)
    assert [(m.index, m.count, m.coordinator) for m in (*first, *second)] == [
        (0, 2, "host2:5000"),
        (1, 2, "host2:5000"),
    ]
    assert [member.sent[1:] for member in driver.members] == [[Beat(7, 1)]] * 2
    assert all(member.sent[0].asked == b"asked" for member in driver.members)


def test_the_driver_hears_what_holds_for_all_members_and_results_of_the_first():
    driver = Driver(FakeBackend())
    first, second = driver.members
    second.say(Checked(7, b"two"))
    first.say(Serving(7))
    first.say(Alive(7, 1, 3))
    first.say(Alive(7, 2, 3))
    assert not driver.heard
    first.say(Checked(7, b"one"))
    second.say(Serving(7))
    second.say(Alive(7, 2, 4))
    second.say(Alive(7, 1, 4))  # which the answer to a later one has overtaken
    second.say(Alive(6, 3))  # of an epoch before
    assert driver.heard == [Checked(7, b"one two"), Serving(7), Alive(7, 2, 4)]
    posted = Posted(7, 1.0, ())
    first.say(posted)
    second.say(posted)
    assert len(driver.heard) == 4


def test_programs_for_masks_are_there_when_every_member_has_them():
    driver = Driver(FakeBackend())
    first, second = driver.members
    for why, said in ((None, MasksPrepared(7)), ("its disk is full", MasksPrepared(7, "its disk is full"))):
        driver.handle.send(wire.encode(PrepareMasks(7)))
        second.say(MasksPrepared(7, why))
        assert said not in driver.heard
        first.say(MasksPrepared(7))
        assert driver.heard[-1] == said
    assert [member.sent for member in driver.members] == [[PrepareMasks(7)] * 2] * 2
    assert len(driver.heard) == 2


def test_any_member_may_refuse_and_so_does_a_group_that_has_not_found_the_same():
    driver = Driver(FakeBackend())
    driver.members[1].say(Refused(7, "its disk is full."))
    assert driver.heard == [Refused(7, "its disk is full.")]

    def merge(found):
        raise ValueError("process 1 has another jax.")

    driver = Driver(FakeBackend(), merge=merge)
    for member in driver.members:
        member.say(Checked(7, b""))
    assert driver.heard == [Refused(7, "process 1 has another jax.")]


@pytest.mark.parametrize("dead", [0, 1])
def test_one_members_end_is_that_of_all_and_is_told_once_all_have_ended(dead):
    backend = FakeBackend()
    driver, others = Driver(backend), Driver(backend, worker=1)
    driver.members[dead].end("it was ended by SIGKILL.")
    assert driver.members[1 - dead].kills
    assert not driver.ends
    driver.members[1 - dead].end("it was ended by SIGKILL, too.")
    assert driver.ends == [f"process {dead}, one of 2 with this mesh: it was ended by SIGKILL."]
    assert not any(member.kills for member in others.members)


def test_a_group_that_is_killed_is_killed_as_a_whole():
    driver = Driver(FakeBackend())
    driver.handle.kill()
    assert all(member.kills for member in driver.members)


def test_where_one_cannot_be_started_none_is_left():
    backend = FakeBackend(refuses=1)
    with pytest.raises(ValueError, match="no room for it"):
        Driver(backend)
    assert backend.started[0].kills


def test_every_start_of_a_group_meets_at_another_address():
    backend = FakeBackend()
    driver = Driver(backend)
    for member in driver.members:
        member.end("it ended.")
    handle = driver.groups.start(0, 8, driver.heard.append, driver.ends.append)
    handle.send(wire.encode(Prepare(8, 0, Place((0,), (0, 1)), b"")))
    assert backend.started[0].sent[0].member.coordinator == "host0:5001"


DAMAGED = wire.encode(Serving(7)).replace(b"epoch", b"epic!")


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("data", [b"\x01no message", DAMAGED])
def test_what_is_no_message_goes_to_the_driver_which_says_so(member, data):
    backend, heard = FakeBackend(), []
    Driver(backend).groups.start(1, 7, heard.append, heard.append)
    backend.started[2 + member].receive(data)
    assert heard == [data]


def offer(uuid):
    return KVOffer("shared_memory", uuid, "", 10, ())


def test_an_offer_is_made_of_what_all_members_offer_in_their_order():
    driver = Driver(FakeBackend())
    driver.members[1].say(Offered(7, 4, joined([offer(3)])))
    assert not driver.heard
    driver.members[0].say(Offered(7, 4, joined([offer(1), offer(2)])))
    (message,) = driver.heard
    assert (message.transfer, message.offer.nbytes) == (4, 30)
    assert [part.uuid for part in message.offer.parts] == [1, 2, 3]


def test_a_transfer_is_there_when_all_members_have_their_parts():
    driver = Driver(FakeBackend())
    for member in driver.members:
        assert not driver.heard
        member.say(Transferred(7, 2.0, TransferReady(1.0, 4)))
    assert [(message.sent, message.completions) for message in driver.heard] == [(2.0, (TransferReady(1.0, 4),))]


@pytest.mark.parametrize("other", [TransferReady(1.0, 4), None])
def test_a_transfer_that_fails_in_one_member_has_failed_and_all_let_go_of_it(other):
    driver = Driver(FakeBackend())
    failed = TransferFailed(1.0, 4, "the offer is gone.")
    driver.members[1].say(Transferred(7, 2.0, failed))
    assert not driver.heard
    driver.members[0].say(Offered(7, 4, offer(1)) if other is None else Transferred(7, 2.0, other))
    assert [message.completions for message in driver.heard] == [(failed,)]
    for member in driver.members:
        assert member.sent == [Withdraw(7, 4, False), Turn(7, (DropTransfer(4),))]


@pytest.mark.parametrize("index", [0, 1])
def test_a_member_posts_what_is_its_own_to_say(index):
    sent = []
    outbox = MemberOutbox(7, lambda data: sent.append(wire.decode_from_worker(data)), lambda: 5.0, Member(index, 2, ""))
    result = StepResult(1.0, 0, 3, (), np.zeros((1, 0), np.int32))
    outbox.post(result)
    assert [message.completions[0].step for message in sent] == [3] * (index == 0)
    sent.clear()
    outbox.post(TransferReady(1.0, 4))
    outbox.post(StepFailed(1.0, 0, 4, "no memory"))
    assert sent == [
        Transferred(7, 5.0, TransferReady(1.0, 4)),
        Refused(7, f"process {index} of the 2 of mesh 0 failed: no memory"),
    ]
