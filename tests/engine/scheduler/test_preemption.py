"""Who gives up a place for whom, and who never does."""

from twinmesh.engine.scheduler.request import State

from .test_scheduler import arrive, make, step


def running(scheduler):
    """Names of requests that have a place."""
    return {request.id for request in scheduler.requests.values() if request.state is not State.WAITING}


def run_until_all_decode(scheduler, device):
    for _ in range(50):
        step(scheduler, device)
        if all(request.state is State.DECODE for request in scheduler.requests.values()):
            return
        for mesh, steps in enumerate(device.steps):
            if steps:
                device.complete_step(mesh, 1.0)
        while device.transfers:
            device.complete_transfer(0, 1.0)


def test_a_request_that_arrives_takes_the_slot_of_the_last_with_a_higher_priority_number():
    scheduler, device = make("both=1", slots=3, pages=30)
    for name, priority in (("a", 0), ("b", 1), ("c", 1)):
        arrive(scheduler, device, name, max_tokens=9, priority=priority)
    step(scheduler, device)
    arrive(scheduler, device, "d", t=1.0)
    step(scheduler, device)
    assert running(scheduler) == {"a", "b", "d"}
    device.drain(2.0)
    assert set(device.finished.values()) == {"length"}


def test_one_slot_is_enough_to_be_taken():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, device, "a", priority=1)
    step(scheduler, device)
    arrive(scheduler, device, "b")
    step(scheduler, device)
    assert running(scheduler) == {"b"}


def test_equal_priorities_keep_their_places():
    scheduler, device = make("both=1", slots=2)
    for name in "abc":
        arrive(scheduler, device, name, priority=1)
    step(scheduler, device)
    arrive(scheduler, device, "d", priority=1)
    assert running(scheduler) == {"a", "b"}
    assert scheduler.counters.preemptions == 0


def test_one_that_has_waited_so_long_that_it_comes_first_keeps_its_place():
    scheduler, device = make("both=1", slots=1, age_seconds=10.0)
    arrive(scheduler, device, "a", priority=1, max_tokens=20)
    step(scheduler, device)
    arrive(scheduler, device, "b", t=10.0)
    step(scheduler, device)
    assert running(scheduler) == {"a"}
    arrive(scheduler, device, "c", t=15.0, priority=-1)
    step(scheduler, device)
    assert running(scheduler) == {"c"}


def test_batch_work_goes_first_the_last_due_of_it_before_the_rest():
    scheduler, device = make("both=1", slots=3, pages=30)
    for name, service in (
        ("late", {"priority": 5}), ("due", {"is_batch": True, "due": 9.0}), ("batch", {"is_batch": True})
    ):  # fmt: skip
        arrive(scheduler, device, name, max_tokens=9, **service)
    step(scheduler, device)
    for name, left in (("x", {"late", "due", "x"}), ("y", {"late", "x", "y"}), ("z", {"x", "y", "z"})):
        arrive(scheduler, device, name, max_tokens=9)
        step(scheduler, device)
        assert running(scheduler) == left


def test_batch_work_takes_no_place_of_other_batch_work():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, device, "a", is_batch=True)
    step(scheduler, device)
    arrive(scheduler, device, "b", is_batch=True, due=1.0)
    step(scheduler, device)
    assert running(scheduler) == {"a"}


def test_so_many_give_way_as_make_room_and_nobody_where_there_would_not_be_enough():
    scheduler, device = make("both=1", slots=4, pages=13, length=48)
    arrive(scheduler, device, "first", prompt_len=8, max_tokens=4)
    for name in "abc":
        arrive(scheduler, device, name, prompt_len=8, max_tokens=4, priority=1)
    step(scheduler, device)
    assert running(scheduler) == {"first", "a", "b", "c"}
    arrive(scheduler, device, "huge", prompt_len=44, max_tokens=4)  # 11 pages, and the first one's 2
    step(scheduler, device)
    assert running(scheduler) == {"first", "a", "b", "c"}
    scheduler, device = make("both=1", slots=4, pages=13, length=48)
    for name in "abc":
        arrive(scheduler, device, name, prompt_len=8, max_tokens=4, priority=1)
    step(scheduler, device)
    arrive(scheduler, device, "long", prompt_len=32, max_tokens=4)
    step(scheduler, device)
    assert running(scheduler) == {"a", "long"}
    device.drain(1.0)
    assert set(device.finished.values()) == {"length"}


def test_on_many_meshes_the_one_is_taken_where_the_last_in_the_order_runs():
    scheduler, device = make("both=12", slots=1)
    for number in range(12):
        arrive(scheduler, device, number, priority=2 if number == 7 else 1)
    step(scheduler, device)
    arrive(scheduler, device, "x")
    step(scheduler, device)
    assert running(scheduler) == {*range(12), "x"} - {7}


def test_what_waits_for_credit_takes_the_place_of_what_decodes_behind_it():
    scheduler, device = make("prefill=1,decode=1", slots=2, pages=30)
    for name in "ab":
        arrive(scheduler, device, name, max_tokens=20, priority=1)
    run_until_all_decode(scheduler, device)
    urgent = arrive(scheduler, device, "c", max_tokens=20)
    step(scheduler, device)
    assert urgent.handoff is not None or urgent.placement.mesh == 1
    assert scheduler.requests["b"].preempted == 1
    assert scheduler.requests["a"].preempted == 0
    device.drain(2.0)
    assert set(device.finished.values()) == {"length"}


def test_what_waits_for_credit_does_not_keep_an_urgent_prompt_away_for_long():
    """Half of the prefill mesh is KV of others that waits: it is computed again later."""
    scheduler, device = make("prefill=1,decode=1", slots=4, pages=16)
    slots = scheduler.meshes[1].pages.slots
    while slots.num_free:
        slots.allocate(-1)
    for name in "abc":
        arrive(scheduler, device, name, prompt_len=15, max_tokens=9, priority=1)
    for _ in range(9):
        step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, 1.0)
    assert scheduler.meshes[0].is_backed_up
    urgent = arrive(scheduler, device, "d", prompt_len=15, max_tokens=9)
    step(scheduler, device)
    assert urgent.state is not State.WAITING
    assert scheduler.requests["c"].preempted == 1


def test_who_has_given_way_three_times_keeps_its_place_within_its_class():
    scheduler, device = make("both=1", slots=1)
    victim = arrive(scheduler, device, "a", priority=1, max_tokens=20)
    for number in range(3):
        step(scheduler, device)
        assert victim.state is not State.WAITING
        arrive(scheduler, device, number, max_tokens=1, t=float(number))
        step(scheduler, device)
        assert victim.preempted == number + 1
        device.complete_step(0, float(number))
        while victim.state is State.WAITING:
            step(scheduler, device)
            device.complete_step(0, float(number))
    waiting = arrive(scheduler, device, "x", t=5.0)
    step(scheduler, device)
    assert waiting.state is State.WAITING
    assert victim.preempted == 3
    device.drain(6.0)
    assert set(device.finished.values()) == {"length"}


def test_growth_takes_pages_of_batch_work_whatever_the_policy_would_choose():
    scheduler, device = make("both=1", slots=3, pages=8)
    for name, service in (("a", {}), ("b", {}), ("batch", {"is_batch": True})):
        arrive(scheduler, device, name, prompt_len=7, max_tokens=8, **service)
    device.drain(1.0)
    assert set(device.finished.values()) == {"length"}
    assert list(device.finished)[-1] == "batch"
    assert scheduler.counters.preemptions > 0
