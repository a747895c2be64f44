"""Costs follow what was measured: each step's time from its own begin, by mesh and link, the same in every replay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill, StartTransfer
from twinmesh.engine.scheduler.cost import Costs, Priors, priors_of
from twinmesh.engine.scheduler.cost_model import CostModel, LinkCost, ProgramCost
from twinmesh.engine.scheduler.notes import Notes
from twinmesh.engine.topology import Topology

from .test_scheduler import arrive, make, step


def make_config(topology="both=2"):
    return EngineConfig(topology=Topology.parse(topology), max_model_len=4096, prefill_buckets=(64, 512))


def make_costs(topology="both=2"):
    return Costs(make_config(topology), Notes())


def prefill(number, tokens, mesh=0, bucket=512):
    return Prefill(mesh, number, bucket, (Chunk(0, 0, 0, 0, tokens, 0, True),))


def decode(number, rows, mesh=0, steps=1):
    return Decode(mesh, number, 32, steps, (DecodeRow(0, 0, 0, 9),) * rows)


def run(costs, action, begin, end):
    costs.now = begin
    costs.begin_step(action)
    costs.end_step(action.mesh, action.step, end)


def warm(costs, mesh=0, tokens=100, rows=4, seconds=(0.5, 0.01), first=0):
    """Each kind of step twice: the first does not count."""
    for number in range(first, first + 4, 2):
        run(costs, prefill(number, tokens, mesh), float(number), number + seconds[0])
        run(costs, decode(number + 1, rows, mesh), number + 1.0, number + 1.0 + seconds[1])


def test_priors_count_before_anything_is_measured():
    costs, priors = make_costs(), Priors()
    assert costs.prefill(0, 0) == costs.decode(0, 0) == 0
    assert costs.prefill(0, 1000) == priors.prefill.at(1000)
    assert costs.decode(1, 8) == priors.decode.at(8)
    assert costs.transfer(0, 1, 10**6) == priors.transfer.at(10**6)
    assert not costs.is_measured(0)


def test_a_step_costs_what_it_took():
    costs = make_costs()
    warm(costs)
    assert costs.prefill(0, 100) == pytest.approx(0.5)
    assert costs.prefill(0, 200) == pytest.approx(1.0)
    assert costs.decode(0, 4) == pytest.approx(0.01)
    assert costs.decode(0, 4) < costs.decode(0, 8) < 0.02
    assert costs.is_measured(0)


def test_the_first_step_of_a_size_does_not_count():
    costs = make_costs()
    run(costs, decode(0, 4), 0.0, 60.0)
    assert costs.decode(0, 4) == Priors().decode.at(4)


def test_a_step_begins_when_the_one_before_it_is_done():
    costs = make_costs()
    warm(costs)
    for number in (10, 11, 12, 13):  # dispatched together, done one after the other
        costs.now = 20.0
        costs.begin_step(decode(number, 4))
    for number in (10, 11, 12, 13):
        costs.end_step(0, number, 20.0 + 0.01 * (number - 9))
    assert costs.decode(0, 4) == pytest.approx(0.01)


def test_several_decode_steps_at_once_share_their_time():
    costs = make_costs()
    for number in range(2):
        run(costs, decode(number, 4, steps=5), float(number), number + 0.1)
    assert costs.decode(0, 4) == pytest.approx(0.02)


def test_rows_add_to_a_fused_step_what_a_row_adds_to_a_decode_step():
    costs = make_costs("both(mode=fused)=1")
    warm(costs)
    before = costs.decode(0, 4)
    for number in range(10, 200):
        fused = Fused(0, number, 512, prefill(0, 100).chunks, decode(0, 4).rows)
        run(costs, fused, float(number), number + 0.6)
    assert costs.prefill(0, 100) + costs.beside(0, 4) == pytest.approx(0.6, rel=0.02)
    assert costs.decode(0, 4) == before
    assert 0 < costs.beside(0, 4) < costs.decode(0, 4)


def test_a_step_comes_between_two_chunks_where_meshes_take_turns():
    costs = make_costs("both=1")
    warm(costs)
    assert costs.beside(0, 4) == costs.decode(0, 4) > 0
    assert costs.beside(0, 0) == 0


def test_a_mesh_that_has_measured_nothing_borrows_from_one_of_the_same_tp():
    costs = make_costs("prefill=2,decode=2xtp2")
    warm(costs, mesh=1)
    assert costs.prefill(0, 100) == pytest.approx(0.5)
    assert costs.prefill(2, 100) == Priors().prefill.at(100)
    warm(costs, mesh=0, seconds=(0.25, 0.02), first=10)
    assert costs.prefill(1, 100) == pytest.approx(0.5)


def transfer(costs, number, begin, end, link=(0, 1), size=1000):
    costs.now = begin
    costs.begin_transfer(StartTransfer(number, 1, link[0], 0, ((0,),), link[1]), size)
    costs.end_transfer(number, end)


def test_a_link_costs_what_its_transfers_took_and_the_others_as_much_as_the_last():
    costs = make_costs("both=3")
    transfer(costs, 0, 1.0, 1.2)
    assert costs.transfer(0, 1, 1000) == pytest.approx(0.2)
    assert costs.transfer(2, 1, 1000) == pytest.approx(0.2)
    transfer(costs, 1, 2.0, 2.1, (2, 1))
    assert costs.transfer(0, 1, 1000) == pytest.approx(0.2)
    assert costs.transfer(2, 1, 1000) == pytest.approx(0.1)


def test_a_transfer_begins_when_its_source_has_done_the_steps_before_it():
    costs = make_costs()
    costs.now = 1.0
    costs.begin_step(prefill(0, 100))
    costs.begin_transfer(StartTransfer(0, 1, 0, 0, ((0,),), 1), 1000)
    costs.begin_step(decode(1, 1))
    costs.end_step(0, 0, 6.0)
    costs.end_step(0, 1, 7.0)
    costs.end_transfer(0, 6.5)
    assert costs.transfer(0, 1, 1000) == pytest.approx(0.5)


def test_failed_transfers_and_lost_meshes_measure_nothing():
    costs = make_costs()
    costs.begin_step(prefill(0, 100))
    costs.begin_transfer(StartTransfer(0, 1, 0, 0, ((0,),), 1), 1000)
    costs.lose_mesh(0)
    costs.end_transfer(0, None)
    costs.end_transfer(0, 5.0)
    costs.check([(), ()])
    assert costs.transfer(0, 1, 1000) == Priors().transfer.at(1000)


works = st.tuples(st.sampled_from(["prefill", "decode", "fused"]), st.integers(1, 512), st.integers(1, 32))
times = st.floats(0.0, 10.0, allow_nan=False)


@given(st.lists(st.tuples(works, st.integers(0, 1), times, times), max_size=60))
def test_costs_are_never_negative_and_the_same_when_replayed(measured):
    first, second = make_costs(), make_costs()
    for costs in (first, second):
        now = 0.0
        for number, ((kind, tokens, rows), mesh, wait, seconds) in enumerate(measured):
            chunks, drows = prefill(0, tokens).chunks, decode(0, rows).rows
            action = {
                "prefill": Prefill(mesh, number, 512, chunks),
                "decode": Decode(mesh, number, 32, 1, drows),
                "fused": Fused(mesh, number, 512, chunks, drows),
            }[kind]
            now += wait
            run(costs, action, now, now + seconds)
    for mesh in (0, 1):
        for size in (1, 100, 5000):
            assert 0 <= first.prefill(mesh, size) == second.prefill(mesh, size)
            assert 0 <= first.decode(mesh, size) == second.decode(mesh, size)


def test_the_scheduler_measures_what_its_devices_do():
    scheduler, device = make("prefill=1,decode=1")
    for number in range(6):
        arrive(scheduler, device, f"r{number}", t=10.0 * number)
        for t in range(1, 8):
            step(scheduler, device)
            for mesh, steps in enumerate(device.steps):
                if steps:
                    device.complete_step(mesh, 10.0 * number + t)
            step(scheduler, device)
            if device.transfers:
                device.complete_transfer(0, 10.0 * number + t + 0.5)
            scheduler.check_integrity()
    assert scheduler.costs.prefill(0, 6) == pytest.approx(1.0)
    assert 0 < scheduler.costs.decode(1, 1) <= 1.0
    assert scheduler.costs.transfer(0, 1, 4) == pytest.approx(0.5)


def test_what_is_dispatched_keeps_a_mesh_busy_until_it_should_be_done():
    costs = make_costs()
    warm(costs)
    assert costs.busy(0) == 0.0
    costs.now = 50.0
    costs.begin_step(prefill(10, 100))
    costs.begin_step(decode(11, 4))
    assert costs.busy(0) == pytest.approx(0.51)
    costs.now = 50.4
    assert costs.busy(0) == pytest.approx(0.11)
    costs.end_step(0, 10, 50.4)
    assert costs.busy(0) == pytest.approx(0.01)
    costs.now = 60.0
    assert costs.busy(0) == 0.0


def test_priors_of_a_cost_model_are_lines_through_its_smallest_and_largest_steps():
    model = CostModel(
        {64: ProgramCost(0.1), 512: ProgramCost(0.5, chunk=0.048)},
        {1: ProgramCost(0.01), 33: ProgramCost(0.01, row=0.001)},
        {},
        LinkCost(0.002, 1e-9),
    )
    priors = priors_of(model, make_config())
    assert priors.prefill == pytest.approx((0.036, 0.001))
    assert priors.decode == pytest.approx((0.009, 0.001 + 0.001 / 32), rel=0.1)
    assert priors.transfer == (0.002, 1e-9)


def test_of_one_size_part_of_its_time_grows_with_it_and_what_is_not_known_stays():
    priors = priors_of(CostModel({512: ProgramCost(0.512)}, {}, {}, LinkCost(0, 0)), make_config())
    assert priors.prefill == pytest.approx((0.0, 0.001))
    assert (priors.decode, priors.transfer) == (Priors().decode, Priors().transfer)
