"""Workloads through the real core and scheduler in virtual time: when what happens, by hand."""

import gc
import io
from dataclasses import replace

import pytest
from helpers.simulated import PAGE, costs, engine, load
from twinmesh.engine.metrics.gaps import Gaps
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.cost_model import HostCost, LinkCost, ProgramCost
from twinmesh.engine.scheduler.decision_log import DecisionLog
from twinmesh.engine.simulation.incidents import Aborted, MeshFails, MeshGone, MeshStarts, RolesCalled
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import WorkRequest


def run(*requests, on=None, **options):
    """Simulate these requests; return their records by number."""
    done = simulate(load(*requests), on or engine(), **options)
    return sorted(done.records, key=lambda record: record.number)


def test_the_first_token_of_an_empty_engine_takes_host_and_step_and_is_stamped_before_it_is_read():
    host = HostCost(arrival=0.002, token=0.00001, step=0.003, row=0.0005, read=0.004, idle=0.006)
    (record,) = run(WorkRequest(100, 3, at=1.0), on=engine(prices=costs(host=host)))
    assert record.ttft == pytest.approx(0.002 + 0.001 + 0.003 + 0.0005 + 0.006 + 0.4)
    assert record.queue + record.prefill + record.host == pytest.approx(record.ttft)
    assert (record.reason, record.output_len) == ("length", 3)


def test_decode_steps_follow_each_other_without_a_gap():
    gaps = Gaps()
    (record,) = run(WorkRequest(10, 11, at=0.0), gaps=gaps)
    assert record.ttft == pytest.approx(0.1)
    assert record.tpot == pytest.approx(0.01)
    assert gaps.distribution().count == 10


def test_a_step_takes_what_its_chunks_rows_and_context_cost():
    prices = costs(
        prefill={64: ProgramCost(0.1), 256: ProgramCost(0.4, chunk=0.01, pair=1e-6)},
        decode={8: ProgramCost(0.01, row=0.001, context=1e-5)},
    )
    (record,) = run(WorkRequest(100, 2, at=0.0), on=engine(prices=prices))
    assert record.ttft == pytest.approx(0.4 + 0.01 + 1e-6 * 100 * 101 / 2)
    assert record.tpot == pytest.approx(0.01 + 0.001 + 101e-5)


def test_several_decode_steps_are_one_dispatch_and_as_long():
    one, eight = (simulate(load(WorkRequest(10, 17, at=0.0)), engine(decode_steps=steps)) for steps in (1, 8))
    assert [r.finish for r in eight.records] == pytest.approx([r.finish for r in one.records])
    assert eight.metrics.steps < one.metrics.steps / 3


def test_the_second_prompt_waits_for_the_first_and_its_decode_step():
    first, second = run(WorkRequest(200, 5, at=0.0), WorkRequest(200, 5, at=0.05))
    assert first.ttft == pytest.approx(0.4)
    assert second.ttft == pytest.approx(0.4 + 0.01 + 0.4 - 0.05)
    assert second.queue > 0.3


def test_decode_steps_and_chunks_alternate():
    first, second = run(WorkRequest(10, 4, at=0.0), WorkRequest(600, 1, at=0.105))
    # 0.1 s of prefill and a decode step dispatched ahead; then a chunk of 0.4 s before each token that is left.
    assert first.finish == pytest.approx(0.1 + 0.01 + 0.01 + 0.4 + 0.01)
    assert second.ttft == pytest.approx(first.finish + 0.4 + 0.4 - 0.105, abs=0.02)


def test_fused_steps_do_both_at_once():
    first, second = run(WorkRequest(10, 2, at=0.0), WorkRequest(100, 1, at=0.05), on=engine("both(mode=fused)=1"))
    assert first.finish == pytest.approx(0.1 + 0.01) or first.finish == pytest.approx(0.1 + 0.4)
    assert second.finish == pytest.approx(0.5, abs=0.02)


def test_a_hand_off_takes_the_time_of_its_link():
    done = simulate(load(WorkRequest(100, 3, at=0.0)), engine("prefill=1,decode=1"))
    (record,) = done.records
    assert record.ttft == pytest.approx(0.4)
    assert record.handoff == pytest.approx(0.001 + 0.016)  # 7 pages in a bucket of 16
    assert record.finish == pytest.approx(0.4 + 0.017 + 2 * 0.01)
    assert (done.metrics.handoffs, done.metrics.handoff_bytes) == (1, 16_000)
    assert done.busy == pytest.approx((0.4, 0.02))


def test_meshes_compute_nothing_while_they_gather_or_scatter():
    prices = costs(link=LinkCost(0.001, 1e-6, gather=5e-6, scatter=2e-6))
    requests = [WorkRequest(100, 3, at=0.0), WorkRequest(100, 1, at=0.05)]
    first, second = run(*requests, on=engine("prefill=1,decode=1", prices))
    assert second.finish == pytest.approx(0.4 + 16_000 * 5e-6 + 0.4)  # its prompt comes after the gather
    assert first.finish == pytest.approx(0.4 + 0.017 + 16_000 * 2e-6 + 2 * 0.01)


@pytest.mark.parametrize(("is_shared", "seconds"), [(True, 0.033), (False, 0.017)])
def test_transfers_under_way_at_once_share_a_link(is_shared, seconds):
    two = [WorkRequest(100, 2, at=0.0)] * 2
    prices = costs(link=LinkCost(0.001, 1e-6, is_shared))
    records = run(*two, on=engine("prefill=1,decode=1", prices))
    assert [record.handoff for record in records] == pytest.approx([seconds] * 2)


def test_meshes_slow_each_other_down_exactly_while_both_compute():
    slow = {64: ProgramCost(0.1), 256: ProgramCost(0.4, beside_prefill=1.0)}
    first, second = run(
        WorkRequest(200, 1, at=0.0), WorkRequest(200, 1, at=0.2), on=engine("both=2", costs(prefill=slow))
    )
    assert first.finish == pytest.approx(0.2 + 0.4)  # half of it alone, half at half the speed
    assert second.finish == pytest.approx(0.6 + 0.2)


def test_a_mesh_that_is_not_there_yet_lets_what_it_is_given_wait():
    (record,) = run(WorkRequest(10, 1, at=0.0), incidents=[MeshStarts(2.0, 0)])
    assert record.ttft == pytest.approx(2.1)


@pytest.mark.parametrize("topology", ["both=2", "prefill=2,decode=2", "pool=3"])
@pytest.mark.parametrize("at", [0.2, 0.41, 1.0])
def test_nothing_is_lost_when_a_mesh_fails(topology, at):
    requests = [WorkRequest(200, 20, at=0.1 * number) for number in range(10)]
    for mesh in range(len(engine(topology).pools)):
        done = simulate(load(*requests), engine(topology), incidents=[MeshFails(at, mesh, down=0.3)])
        assert [(record.reason, record.output_len) for record in done.records] == [("length", 20)] * 10
    assert done.metrics.requests == {"length": 10}


def test_requests_of_a_mesh_that_fails_start_again_and_take_longer():
    before, after = run(WorkRequest(200, 2, at=0.0)) + run(
        WorkRequest(200, 2, at=0.0), incidents=[MeshFails(0.3, 0, down=0.5)]
    )
    assert after.ttft == pytest.approx(0.3 + 0.5 + before.ttft)


@pytest.mark.parametrize("topology", ["both=2", "prefill=2,decode=2", "prefill=1,decode=1", "pool=3"])
@pytest.mark.parametrize("at", [0.2, 0.41, 1.0])
def test_nothing_is_lost_when_a_mesh_is_gone_and_joins_again(topology, at):
    requests = [WorkRequest(200, 20, at=0.1 * number) for number in range(10)]
    for mesh in range(len(engine(topology).pools)):
        log = io.StringIO()
        lost = [MeshGone(at, mesh, down=0.7), MeshGone(at + 1.0, mesh, down=0.2)]
        done = simulate(load(*requests), engine(topology), incidents=lost, log=DecisionLog(log))
        assert [(record.reason, record.output_len) for record in done.records] == [("length", 20)] * 10
        log.seek(0)
        assert len(replay(log).finished) == 10


def test_a_host_that_is_silent_is_missed_later_and_its_requests_start_over_then():
    lost = [MeshGone(0.205, 0, down=3.0, silent=1.0)]
    known, silent = (
        simulate(load(WorkRequest(200, 40, at=0.0)), engine("both=1"), incidents=[case])
        for case in (MeshGone(0.205, 0, down=3.0), *lost)
    )
    assert known.records[0].finish == silent.records[0].finish  # it has to wait until the host is there again
    assert known.displaced == silent.displaced == 1
    two = simulate(load(WorkRequest(200, 40, at=0.0)), engine("both=2"), incidents=lost)
    at_once = simulate(load(WorkRequest(200, 40, at=0.0)), engine("both=2"), incidents=[MeshGone(0.205, 0, down=3.0)])
    assert two.records[0].finish == pytest.approx(at_once.records[0].finish + 1.0)
    assert two.records[0].output_len == 40
    with pytest.raises(ValueError, match="give 0 <= silent <= down"):
        MeshGone(0.0, 0, down=1.0, silent=2.0)


@pytest.mark.long
def test_of_256_hosts_13_are_lost_within_a_minute_and_no_request():
    requests = [WorkRequest(300, 40, at=0.03 * number) for number in range(3000)]
    lost = [MeshGone(20.0 + 4.6 * number, 19 * number, down=20.0) for number in range(13)]
    on = engine("prefill=96,decode=160")
    without, done = simulate(load(*requests), on), simulate(load(*requests), on, incidents=lost)
    assert [(record.reason, record.output_len) for record in done.records] == [("length", 40)] * 3000
    assert done.metrics.retries == 0
    worst = max(record.finish for record in done.records) - max(record.finish for record in without.records)
    assert worst < 2.0  # seconds: what the requests of the last lost mesh compute again


def test_a_mesh_that_fails_idle_costs_its_cache_alone():
    shared = tuple(range(10))
    records = run(
        WorkRequest(160, 1, at=0.0, blocks=shared), WorkRequest(160, 1, at=1.0, blocks=shared),
        WorkRequest(160, 1, at=3.0, blocks=shared), incidents=[MeshFails(2.0, 0)],
    )  # fmt: skip
    assert [record.cached_len for record in records] == [0, 159, 0]


def test_roles_that_are_called_for_are_taken():
    requests = [WorkRequest(100, 30, at=0.05 * number) for number in range(40)]
    done = simulate(
        load(*requests),
        engine("pool=3"),
        incidents=[RolesCalled(0.5, "prefill=1,decode=2"), RolesCalled(1.2, "both=3")],
    )
    assert [record.reason for record in done.records] == ["length"] * 40
    assert [sorted(roles) for _, roles in done.roles] == [
        ["both"] * 3, ["decode", "decode", "prefill"], ["both"] * 3,
    ]  # fmt: skip
    assert [t for t, _ in done.roles] == pytest.approx([0.0, 0.5, 1.2])
    assert {(flip.t, flip.reason) for flip in done.flips} == {(0.5, "called for"), (1.2, "called for")}


def test_a_request_that_waits_for_another_comes_after_its_end_and_pause():
    first, second, third = run(
        WorkRequest(10, 5, at=0.0), WorkRequest(10, 5, after=0, pause=2.0), WorkRequest(10, 5, after=0)
    )
    assert second.arrival == pytest.approx(first.finish + 2.0)
    assert third.arrival == pytest.approx(first.finish)


def test_what_waits_for_a_request_that_fails_comes_all_the_same():
    first, second = run(
        WorkRequest(100, 5, at=0.0),
        WorkRequest(10, 5, after=0),
        on=engine(max_retries=0),
        incidents=[MeshFails(0.1, 0)],
    )
    assert (first.reason, second.reason) == ("error", "length")
    assert second.arrival == pytest.approx(0.1)


def test_the_next_turn_finds_prompt_and_answer_in_the_cache():
    first, second = run(
        WorkRequest(100, 60, at=0.0, blocks=tuple(range(10)), session="a"),
        WorkRequest(200, 5, after=0, blocks=(*range(10), 20, 21, 22), session="a"),
    )
    assert first.cached_len == 0
    assert second.cached_len == 9 * PAGE  # of 160 tokens the last one was sampled and never computed


def test_prompts_without_blocks_share_nothing():
    assert [record.cached_len for record in run(*[WorkRequest(160, 1, at=float(t)) for t in range(3)])] == [0] * 3


def test_arrivals_that_the_waiting_room_has_no_place_for_are_refused():
    records = run(*[WorkRequest(200, 50, at=0.0)] * 12, on=engine(max_num_seqs=1, max_waiting=3))
    reasons = [record.reason for record in records]
    assert reasons.count("length") + reasons.count("refused") == 12
    assert reasons.count("refused") >= 6
    assert {record.output_len for record in records if record.reason == "refused"} == {0}


def test_a_request_that_is_aborted_ends_and_one_that_is_late_expires():
    aborted, late = run(
        WorkRequest(10, 900, at=0.0),
        WorkRequest(10, 900, at=0.0, service=Service(deadline=1.0)),
        incidents=[Aborted(0.5, 0), Aborted(0.6, 7)],
    )
    assert (aborted.reason, aborted.finish) == ("abort", pytest.approx(0.5))
    assert (late.reason, late.finish) == ("deadline", pytest.approx(1.0))


def busy_run(seed=0, noise=0.0):
    """A run with flips, failures, sessions and too few pages, and its decision log."""
    requests = []
    for number in range(60):
        blocks = (*range(number % 7), 100 + number)
        requests.append(WorkRequest(16 * len(blocks) + 3, 40, at=0.03 * number, blocks=(*blocks, 200 + number)))
    requests += [WorkRequest(90, 10, after=number, pause=0.1, session=f"s{number}") for number in range(0, 60, 5)]
    text = io.StringIO()
    log = DecisionLog(text)
    incidents = [MeshFails(0.7, 1, 0.2), RolesCalled(0.4, "prefill=1,decode=3"), RolesCalled(1.0, "prefill=2,both=2")]
    prices = costs(host=HostCost(0.001, 1e-5, 0.0005, 1e-5, 0.0002))
    on = engine("pool=4", prices, pages=80)
    done = simulate(load(*requests), on, seed=seed, noise=noise, log=log, incidents=incidents)
    return done, text.getvalue()


def test_a_run_is_the_same_every_time_and_noise_alone_hangs_on_the_seed():
    (first, text), (second, other) = (busy_run(seed) for seed in (0, 1))
    assert text == other
    assert list(first.records) == list(second.records)
    noisy = [busy_run(seed, noise=0.1)[1] for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert text != noisy[0]


def test_its_decision_log_replays():
    done, text = busy_run(noise=0.1)
    result = replay(io.StringIO(text))
    assert result.decisions == done.decisions
    assert len(result.finished) == len(done.records) == 72
    assert done.metrics.flips > 0
    assert done.metrics.retries > 0


def test_true_times_may_be_others_than_the_costs():
    assert run(WorkRequest(100, 1, at=0.0), speed=1.25)[0].ttft == pytest.approx(0.5)
    noisy = [run(WorkRequest(100, 1, at=0.0), noise=0.1, seed=seed)[0].ttft for seed in range(40)]
    assert sum(noisy) / 40 == pytest.approx(0.4, rel=0.05)
    assert max(noisy) > 0.44


def test_the_collector_of_cycles_is_left_as_it_was():
    before, seen = gc.get_threshold(), []
    run(WorkRequest(8, 2, 0.0), each=lambda record: seen.append(gc.get_threshold()))
    assert gc.get_threshold() == before != seen[0]


def test_records_may_go_elsewhere_one_by_one():
    seen = []
    done = simulate(load(*[WorkRequest(10, 2, at=0.0)] * 3), engine(), each=seen.append)
    assert [record.number for record in seen] == [0, 1, 2]
    assert len(done.records) == 0


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([WorkRequest(0, 1, at=0.0)], r"^request 0 of test has 0 prompt and 1 output tokens"),
        (
            [WorkRequest(1, 1, at=1.0), WorkRequest(1, 1, at=0.5)],
            r"^request 1 of test comes at 0.5 s, after one at",
        ),
        ([WorkRequest(1, 1)], r"^request 0 of test has no time and waits for no earlier one"),
        ([WorkRequest(1, 1, after=0)], r"^request 0 of test has no time and waits for no earlier one"),
        ([WorkRequest(1000, 100, at=0.0)], r"1000 prompt and 100 output tokens, and .* max_model_len=1024"),
    ],
)
def test_requests_that_cannot_be_are_refused_by_number(requests, words):
    with pytest.raises(ValueError, match=words):
        run(*requests)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speed": 0.0}, "^speed=0.0, noise=0.0: speed must be above 0"),
        ({"noise": -0.1}, "noise at least 0"),
        ({"incidents": [MeshFails(1.0, 1)]}, r"of no mesh that there is: they are 0 to 0\.$"),
        ({"incidents": [RolesCalled(1.0, "prefill=1")]}, "pool"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        run(WorkRequest(1, 1, at=0.0), **options)


def test_an_engine_needs_costs_and_pools_of_each_mesh():
    whole = engine("both=2")
    with pytest.raises(ValueError, match="2 meshes, with 1 pools and 2 cost models"):
        replace(whole, pools=whole.pools[:1])
    assert isinstance(replace(whole, costs=(costs(), costs())), SimulatedEngine)
