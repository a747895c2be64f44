"""Requests whose every token needs those before it on the host: no step of theirs runs ahead."""

from twinmesh.engine.protocol.actions import Decode, Finish, Prefill
from twinmesh.engine.protocol.events import RequestFailed
from twinmesh.engine.scheduler.request import State

from .test_scheduler import arrive, make, only, step


def rows(actions):
    return [{row.request_id for row in action.rows} for action in only(actions, Decode)]


def begun(*names, topology="both=1", constrained=(), **changes):
    """Requests whose prompts are computed and answered."""
    scheduler, device = make(topology, pages=64, length=64, **changes)
    for name in names:
        arrive(scheduler, device, name, max_tokens=20, constrained=name in constrained)
    while any(request.state is not State.DECODE for request in scheduler.requests.values()):
        step(scheduler, device)
        for mesh in range(len(scheduler.meshes)):
            if device.steps[mesh]:
                device.complete_step(mesh, 1.0)
        if device.transfers:
            device.complete_transfer(0, 1.0)
    while device.steps[-1]:
        device.complete_step(len(scheduler.meshes) - 1, 1.0)
    return scheduler, device


def test_a_free_request_runs_ahead_and_a_constrained_one_beside_it_takes_every_second_step():
    scheduler, device = begun("a", "b", constrained={"b"})
    assert rows(step(scheduler, device)) == [{"a", "b"}, {"a"}]
    device.complete_step(0, 2.0)
    assert rows(step(scheduler, device)) == [{"a", "b"}]
    device.complete_step(0, 3.0)
    assert rows(step(scheduler, device)) == [{"a"}]


def test_constrained_requests_alone_have_one_step_in_flight_with_all_of_them():
    scheduler, device = begun("a", "b", constrained={"a", "b"})
    for _ in range(4):
        assert rows(step(scheduler, device)) == [{"a", "b"}]
        assert not rows(step(scheduler, device))
        device.complete_step(0, 2.0)


def test_one_whose_prompt_ends_while_others_decode_joins_their_next_step():
    scheduler, device = begun("a", constrained={"a"})
    assert rows(step(scheduler, device)) == [{"a"}]
    arrive(scheduler, device, "b", max_tokens=20, constrained=True)
    assert len(only(step(scheduler, device), Prefill)) == 1
    device.complete_step(0, 2.0)
    assert rows(step(scheduler, device)) == [{"a"}]  # behind the prefill, whose token is not read yet
    device.complete_step(0, 3.0)
    assert not rows(step(scheduler, device))  # b alone: it waits for a
    device.complete_step(0, 4.0)
    assert rows(step(scheduler, device)) == [{"a", "b"}]


def test_a_constrained_request_keeps_steps_single_where_several_are_dispatched_at_once():
    scheduler, device = begun("a", "b", constrained={"b"}, decode_steps=4)
    assert {action.steps for action in only(step(scheduler, device), Decode)} == {1}
    scheduler, device = begun("a", "b", decode_steps=4)
    assert {action.steps for action in only(step(scheduler, device), Decode)} == {4}


def test_a_request_that_cannot_go_on_ends_with_the_reason_and_frees_what_it_holds():
    scheduler, device = begun("a", "b", constrained={"b"})
    scheduler.on(RequestFailed(2.0, "b", "the grammar is too much"))
    scheduler.on(RequestFailed(2.0, "b", "again"))
    assert only(step(scheduler, device), Finish) == [Finish("b", "error", "the grammar is too much")]
    scheduler.check_integrity()
    assert [*scheduler.requests] == ["a"]
