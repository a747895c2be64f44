"""No inversion: what an urgent request waits for is computed and sent at its urgency, and no longer."""

from twinmesh.engine.protocol.actions import Prefill
from twinmesh.engine.protocol.events import AbortRequested, PreemptRequested

from .test_scheduler import arrive, make, only, step


def begin():
    """A long prompt of low priority is computed before another of middle priority, and an urgent one needs it."""
    scheduler, device = make("both=1", prefill_buckets=(4,), pages=64, length=48)
    leader = arrive(scheduler, device, "leader", prompt_len=20, prompt="p", priority=2)
    step(scheduler, device)
    arrive(scheduler, device, "middle", prompt_len=20, priority=1)
    urgent = arrive(scheduler, device, "urgent", prompt_len=24, prompt="p")
    return scheduler, device, leader, urgent


def order_of_chunks(scheduler, device, count):
    """Names of the requests of the next chunks."""
    chunks = []
    while len(chunks) < count:
        chunks += [chunk.request_id for action in only(step(scheduler, device), Prefill) for chunk in action.chunks]
        device.complete_step(0, 1.0)
    return chunks


def test_who_computes_what_an_urgent_request_waits_for_goes_before_others():
    scheduler, device, leader, urgent = begin()
    own = leader.order
    step(scheduler, device)
    assert urgent.sleeps_for is not None
    assert leader.order == (*urgent.order, leader.number)
    device.complete_step(0, 1.0)
    chunks = order_of_chunks(scheduler, device, 5)
    assert chunks == ["leader", "leader", "leader", "urgent", "middle"]
    assert leader.order == own


def test_one_that_starts_over_has_its_own_place_again():
    scheduler, device, leader, urgent = begin()
    own = leader.order
    step(scheduler, device)
    scheduler.on(PreemptRequested(1.0, "leader"))
    assert leader.order == own
    scheduler.check_integrity()
    step(scheduler, device)
    assert urgent.placement is not None
    device.drain(2.0)
    assert set(device.finished.values()) == {"length"}


def test_the_most_urgent_of_those_that_wait_lends():
    scheduler, device, leader, urgent = begin()
    step(scheduler, device)
    first = arrive(scheduler, device, "first", prompt_len=24, prompt="p", priority=-1)
    step(scheduler, device)
    assert leader.order == (*first.order, leader.number)
    scheduler.on(AbortRequested(2.0, "leader"))
    step(scheduler, device)
    assert first.placement is not None
    assert urgent.placement is None


def test_who_sends_what_an_urgent_request_waits_for_is_sent_first():
    scheduler, device = make("prefill=2,decode=1", pages=64, length=48)
    scheduler.meshes[2].staging = 0  # credit is given, and nothing can be sent
    leader = arrive(scheduler, device, "leader", prompt_len=8, prompt="p", priority=2)
    step(scheduler, device)
    middle = arrive(scheduler, device, "middle", prompt_len=8, priority=1)
    step(scheduler, device)
    assert leader.handoff is not None
    assert middle.order < leader.order
    urgent = arrive(scheduler, device, "urgent", prompt_len=12, prompt="p")
    while urgent.sleeps_for is None:
        for mesh in (0, 1):
            if device.steps[mesh]:
                device.complete_step(mesh, 1.0)
        step(scheduler, device)
    assert leader.order == (*urgent.order, leader.number)
    assert leader.order < middle.order
