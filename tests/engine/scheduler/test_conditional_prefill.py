"""Prompts on decode meshes: only without harm to the answers there, and decoded in place; the mesh stays what it is."""

from math import inf

import pytest
from helpers.fake_device import block_hashes
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Prefill, StartTransfer
from twinmesh.engine.protocol.cache_report import MissReason
from twinmesh.engine.protocol.events import Arrived, RequestFacts
from twinmesh.engine.protocol.service import SLO, Service
from twinmesh.engine.scheduler.notes import Conditional
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.tpot_targets import Targets
from twinmesh.engine.topology import Role

from .test_scheduler import PAGE, make, only, step

P, D = Role.PREFILL, Role.DECODE
LOOSE, TIGHT = SLO(tpot_ms=1000), SLO(tpot_ms=20)


def pool(roles=(P, D), **options):
    """A pool whose costs are measured: 1 ms a prompt token, 10 ms a decode step."""
    scheduler, device = make(f"pool={len(roles)}", roles=roles, **{"pages": 64, "length": 64} | options)
    costs = scheduler.costs
    for number in range(-8, 0, 2):
        t = number * 10.0
        costs.now = t
        costs.begin_step(Prefill(0, number, 8, (Chunk(0, 0, 0, 0, 8, 0, True),)))
        costs.end_step(0, number, t + 0.008)
        costs.begin_step(Decode(0, number + 1, 4, 1, (DecodeRow(0, 0, 0, 9),)))
        costs.end_step(0, number + 1, t + 0.018)
    costs.now = 0.0
    return scheduler, device


def arrive(scheduler, device, name, prompt_len=6, slo=None, prompt=None, max_tokens=8, t=0.0):
    device.prompts[name] = (prompt or name, prompt_len)
    hashes = block_hashes(prompt or name, prompt_len, PAGE)
    scheduler.on(Arrived(t, RequestFacts(name, prompt_len, max_tokens, hashes, service=Service(slo=slo))))
    return scheduler.requests[name]


def prefilled_on(scheduler, device, request):
    step(scheduler, device)
    scheduler.check_integrity()
    return request.prefilled_on


def keep_busy(scheduler, device):
    """Give the prefill mesh more to do than a decode mesh would need for a short prompt."""
    request = arrive(scheduler, device, "busy", prompt_len=60, max_tokens=2, slo=LOOSE)
    assert prefilled_on(scheduler, device, request) == 0


def an_answer_on_the_decode_mesh(scheduler, device, slo, name="answer"):
    """A request that decodes on mesh 1."""
    request = arrive(scheduler, device, name, slo=slo, max_tokens=40)
    assert prefilled_on(scheduler, device, request) == 1
    device.complete_step(1, 0.1)
    step(scheduler, device)
    assert request.state is State.DECODE
    return request


def test_a_short_prompt_is_prefilled_where_it_decodes_if_no_answer_runs_there():
    scheduler, device = pool()
    request = arrive(scheduler, device, "a")
    actions = step(scheduler, device)
    assert [action.mesh for action in only(actions, Prefill)] == [1]
    device.drain(1.0)
    assert device.finished == {"a": "length"}
    assert not only(actions, StartTransfer)
    assert request.timeline.kv_ready is None
    assert scheduler.counters.conditional_prefills == 1


def test_nothing_is_prefilled_beside_an_answer_without_an_slo():
    scheduler, device = pool()
    an_answer_on_the_decode_mesh(scheduler, device, None)
    keep_busy(scheduler, device)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "b", slo=LOOSE)) == 0


@pytest.mark.parametrize(("slo", "mesh"), [(LOOSE, 1), (TIGHT, 1), (SLO(tpot_ms=15), 0), (SLO(ttft_ms=1), 1)])
def test_a_prompt_is_prefilled_beside_an_answer_that_keeps_to_its_target(slo, mesh):
    scheduler, device = pool()
    an_answer_on_the_decode_mesh(scheduler, device, slo)
    keep_busy(scheduler, device)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "b", slo=LOOSE)) == mesh


def test_the_engines_slo_is_that_of_requests_without_one():
    scheduler, device = pool(slo=TIGHT)
    answer = an_answer_on_the_decode_mesh(scheduler, device, None)
    assert answer.slo == TIGHT
    keep_busy(scheduler, device)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "b")) == 1


def test_the_tightest_target_counts():
    targets = Targets()
    assert targets.tightest == inf
    for target in (0.5, 0.1, 0.1, inf):
        targets.add(target)
    targets.remove(0.1)
    assert targets.tightest == targets.besides(0.5) == 0.1
    assert targets.besides(0.1) == 0.5
    targets.remove(0.1)
    assert targets.tightest == 0.5


def test_an_idle_prefill_mesh_computes_what_would_come_later_beside_an_answer():
    scheduler, device = pool(slo=LOOSE)
    an_answer_on_the_decode_mesh(scheduler, device, None)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "b")) == 0


def test_a_long_prompt_goes_to_the_prefill_mesh_unless_its_prefix_lies_on_the_decode_mesh():
    scheduler, device = pool()
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "long", prompt_len=30, prompt="p")) == 0
    device.drain(1.0)
    scheduler.meshes[0].pages.flush(MissReason.MESH_LOST)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "again", prompt_len=30, prompt="p")) == 1
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "other", prompt_len=30, prompt="q")) == 0


def test_what_is_left_to_compute_there_never_exceeds_a_step():
    scheduler, device = pool(slo=LOOSE)
    requests = [arrive(scheduler, device, f"r{i}") for i in range(3)]
    step(scheduler, device)
    assert sorted(request.prefilled_on for request in requests) == [0, 0, 1]


def test_a_decode_mesh_that_prefills_a_prompt_takes_no_others_for_it():
    scheduler, device = pool(slots=2)
    first = arrive(scheduler, device, "a")
    step(scheduler, device)
    assert first.prefilled_on == 1
    assert not scheduler.meshes[1].prefills
    others = [arrive(scheduler, device, f"r{i}") for i in range(3)]
    step(scheduler, device)
    assert {request.prefilled_on for request in others if request.state is not State.WAITING} == {0}
    device.drain(1.0)
    assert len(device.finished) == 4


def test_costs_that_nobody_measured_allow_no_harm():
    scheduler, device = make("pool=2", roles=(P, D), pages=64, length=64)
    an_answer_on_the_decode_mesh(scheduler, device, LOOSE)
    keep_busy(scheduler, device)
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "b", slo=LOOSE)) == 0


def test_outside_of_pools_decode_meshes_prefill_nothing():
    scheduler, device = make("prefill=1,decode=1")
    assert prefilled_on(scheduler, device, arrive(scheduler, device, "a", slo=LOOSE)) == 0


works = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "step", "step", "transfer"]),
        st.integers(1, 20),
        st.sampled_from([None, LOOSE, TIGHT, SLO(tpot_ms=14), SLO(ttft_ms=5)]),
        st.sampled_from("pqrs"),
        st.integers(0, 2),
    ),
    max_size=60,
)


@given(works)
def test_no_answer_is_slowed_down_beyond_its_target(work):
    """By the costs at hand whenever a prompt is placed, and everything ends."""
    scheduler, device = pool((P, D, D))
    scheduler.keep_notes()
    for t, (kind, length, slo, prompt, mesh) in enumerate(work):
        if kind == "arrive":
            arrive(scheduler, device, f"r{t}", length, slo, prompt, t=float(t))
        elif kind == "step" and device.steps[mesh]:
            device.complete_step(mesh, float(t))
        elif kind == "transfer" and device.transfers:
            device.complete_transfer(0, float(t))
        step(scheduler, device)
        scheduler.check_integrity()
    notes = [note for note in scheduler.take_notes() if isinstance(note, Conditional)]
    assert len(notes) == scheduler.counters.conditional_prefills
    assert all(not note.rows or note.target is None or note.gap <= note.target for note in notes)
    device.drain(1000.0)
    assert not scheduler.requests
