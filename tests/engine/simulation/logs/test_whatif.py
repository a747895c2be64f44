"""A logged run again: its load, its costs, and what it would have been otherwise."""

import io

import pytest
from helpers.logged_runs import COSTS, MODEL, config_of, engine_of, mixed_load, opened, simulated
from msgspec.structs import replace
from twinmesh.engine.protocol.service import SLO, Service
from twinmesh.engine.scheduler.cost_model import HostCost
from twinmesh.engine.scheduler.decision_log import DecisionLog, RunFacts
from twinmesh.engine.simulation.incidents import Aborted, RolesCalled
from twinmesh.engine.simulation.logs.log_costs import fit_to, transfers_of
from twinmesh.engine.simulation.logs.log_workload import load_of
from twinmesh.engine.simulation.logs.logged_run import read_run
from twinmesh.engine.simulation.logs.whatif import Otherwise, what_if
from twinmesh.engine.simulation.logs.whatif_text import WIDTH, as_text
from twinmesh.engine.simulation.simulator import simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest


def by_id(records, ids=None):
    """What became of each request, without its number."""
    return {record.number if ids is None else ids[record.number]: replace(record, number=0) for record in records}


@pytest.mark.parametrize("topology", ["both=2", "prefill=1,decode=1", "pool=3"])
def test_the_load_of_a_log_gives_the_very_run_again(topology):
    engine = engine_of(config_of(topology), pages=100)
    text, result = simulated(engine, mixed_load(30))
    load = load_of(read_run(opened(text)))
    again = simulate(load.workload, engine, incidents=load.incidents)
    assert by_id(again.records, load.ids) == by_id(result.records)


def test_a_log_tells_what_became_of_each_request():
    text, result = simulated(engine_of(config_of("prefill=1,decode=1"), pages=100), mixed_load(30))
    run = read_run(opened(text))
    for record in result.records:
        logged = run.requests[record.number].record(record.number)
        for name in ("arrival", "prompt_len", "output_len", "cached_len", "first_token", "last_token", "reason"):
            assert getattr(logged, name) == getattr(record, name), name
        assert logged.ttft == pytest.approx(logged.queue + logged.prefill + logged.host)


def test_the_next_turn_of_a_conversation_waits_for_the_one_before_it():
    turns = [
        WorkRequest(100, 20, 0.0, session="a", blocks=(1, 2)), WorkRequest(160, 5, None, 0, 0.5, (1, 3), "a"),
        WorkRequest(50, 5, 0.1),
    ]  # fmt: skip
    text, _ = simulated(engine_of(config_of("both=1")), Workload("turns", turns, 96))
    lines = [line.replace(",0]", "]") if line.startswith('["RequestStamps",1') else line for line in text.splitlines()]
    assert lines != text.splitlines()  # a caller outside knows of no `after`
    load = load_of(read_run(opened("\n".join(lines) + "\n")))
    requests = list(load.workload.requests)
    assert [load.ids.index(id_) for id_ in (0, 2, 1)] == [0, 1, 2]
    assert (requests[2].after, requests[2].at) == (0, None)
    assert requests[2].pause == pytest.approx(0.5)
    assert requests[1].after is None


def test_costs_come_back_from_the_log_that_they_made():
    text, _ = simulated(engine_of(config_of("prefill=1,decode=1")), mixed_load())
    run = read_run(opened(text))
    costs, spread, _ = fit_to(run)
    assert spread < 0.01
    assert transfers_of(run)
    assert costs.link.byte == pytest.approx(COSTS.link.byte, rel=0.02)
    assert costs.prefill[512].fixed == pytest.approx(COSTS.prefill[512].fixed, rel=1e-3)
    assert costs.decode[8].row == pytest.approx(COSTS.decode[8].row, rel=1e-3)


def test_what_never_ran_beside_its_like_is_said_where_it_might_now():
    text, _ = simulated(engine_of(config_of("prefill=1,decode=1")), mixed_load(60, 15.0))
    run = read_run(opened(text))
    said = "prompts never ran beside prompts and decode steps never beside decode steps on another mesh"
    assert said in " ".join(what_if(run, Otherwise("both=2")).notes)
    assert said not in " ".join(what_if(run, Otherwise(policy="spf")).notes)


def test_how_far_steps_spread_comes_back_too():
    text, _ = simulated(engine_of(config_of("both=2")), mixed_load(60), noise=0.2)
    assert fit_to(read_run(opened(text))).spread == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize(("was", "other"), [("both=2", "prefill=1,decode=1"), ("prefill=1,decode=1", "both=2")])
def test_the_other_topology_is_predicted_as_it_would_have_been(was, other):
    text, _ = simulated(engine_of(config_of(was)), mixed_load(60, 15.0))
    _, true = simulated(engine_of(config_of(other)), mixed_load(60, 15.0))
    found = what_if(read_run(opened(text)), Otherwise(other))
    assert max(map(abs, found.errors.values())) < 0.02
    ttft = sorted(record.ttft for record in true.records)
    assert found.otherwise.ttft.p50 == pytest.approx((ttft[29] + ttft[30]) / 2, rel=0.05)
    assert found.otherwise.run.topology == other
    assert found.otherwise.ttft.p50 != pytest.approx(found.happened.ttft.p50, rel=0.05)
    page = as_text(found)
    assert max(map(len, page.splitlines())) <= WIDTH
    assert other in page


def test_a_profile_takes_the_place_of_what_the_log_measured():
    text, result = simulated(engine_of(config_of("both=2")), mixed_load(30))
    found = what_if(read_run(opened(text)), Otherwise(), COSTS)
    assert max(map(abs, found.errors.values())) < 1e-9
    assert found.happened.ttft.count == len(result.records)
    assert found.otherwise is None
    assert any("profile" in note for note in found.notes)


def test_what_was_not_measured_is_named_with_what_stands_in_for_it():
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(30))
    notes = " ".join(what_if(read_run(opened(text)), Otherwise("prefill=1,decode=1")).notes)
    assert "no transfer was measured: one is taken to cost 1 ms and 1 s/GB" in notes
    assert "how much meshes slow each other down was not measured" in notes
    small = Workload("small", [WorkRequest(50, 3, 0.1 * i) for i in range(4)])
    text, _ = simulated(engine_of(config_of("both=1")), small)
    notes = " ".join(what_if(read_run(opened(text)), Otherwise(policy="spf")).notes)
    assert "no prefill step of 256, 512 was measured" in notes
    assert "no decode step of 8 was measured" in notes


def test_callers_who_gave_up_do_so_again_and_roles_are_called_for_again():
    config = config_of("pool=2")
    requests = [WorkRequest(500, 50, 0.05 * i) for i in range(12)]
    incidents = [Aborted(0.4, 3), RolesCalled(0.2, "prefill=1,decode=1", 5.0)]
    text, result = simulated(engine_of(config), Workload("few", requests), incidents=incidents)
    run = read_run(opened(text))
    assert run.requests[3].reason == "abort"
    found = what_if(run, Otherwise(roles="both=2"), COSTS)
    assert found.again.ended == found.happened.ended == {"length": 11, "abort": 1}
    assert max(map(abs, found.errors.values())) < 1e-6
    assert found.otherwise.ttft.p99 != pytest.approx(found.happened.ttft.p99, rel=0.01)
    assert len(result.roles) > 1


def test_a_target_is_judged_on_both_sides():
    requests = [WorkRequest(400, 10, 0.05 * i, service=Service(priority=i)) for i in range(20)]
    text, _ = simulated(engine_of(config_of("both=1")), Workload("few", requests))
    found = what_if(read_run(opened(text)), Otherwise("both=2", slo=SLO(ttft_ms=100.0)))
    assert found.happened.goodput.slo == found.otherwise.goodput.slo == SLO(ttft_ms=100.0)
    assert found.happened.goodput.share < found.otherwise.goodput.share == 1.0


@pytest.mark.parametrize(
    ("otherwise", "message"),
    [
        (Otherwise("both=2xtp2"), "has costs of meshes of tp 1, and both=2xtp2 has others"),
        (Otherwise("both=x"), "is not readable"),
        (Otherwise(roles="prefill=1"), "goes with a pool"),
        (Otherwise(policy="best"), "policy='best' is unknown: the policies are"),
    ],
)
def test_what_cannot_be_is_refused(otherwise, message):
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(10))
    with pytest.raises(ValueError, match=message):
        what_if(read_run(opened(text)), otherwise)


def test_a_log_of_a_run_that_measured_nothing_is_refused():
    text, _ = simulated(engine_of(config_of("both=1")), Workload("one", [WorkRequest(5, 1, 0.0)]))
    with pytest.raises(ValueError, match="too few steps"):
        what_if(read_run(opened(text)), Otherwise())


def test_prompts_that_come_at_once_do_not_each_pay_for_those_before_them():
    host = HostCost(arrival=1e-3)
    requests = [WorkRequest(100, 4, 0.5 * (i // 10)) for i in range(60)]
    text, _ = simulated(engine_of(config_of("both=1"), costs=replace(COSTS, host=host)), Workload("lists", requests))
    found = fit_to(read_run(opened(text))).costs.host
    assert found.arrival + 100 * found.token == pytest.approx(host.arrival, rel=0.2)


def test_a_log_that_lacks_lines_is_damaged_and_says_where():
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(10))
    lines = text.splitlines(keepends=True)
    arrived = next(number for number, line in enumerate(lines) if '"Arrived"' in line)
    with pytest.raises(ValueError, match=r"is damaged at line \d+: it has no request 0 before"):
        read_run(opened("".join(lines[:arrived] + lines[arrived + 1 :])))


def test_the_model_is_in_the_header():
    file = io.StringIO()
    engine = engine_of(config_of("both=1"))
    simulate(Workload("one", [WorkRequest(5, 1, 0.0)]), engine, log=DecisionLog(file, RunFacts(MODEL, "m", "H100")))
    run = read_run(opened(file.getvalue())).run
    assert (run.model, run.name, run.device) == (MODEL, "m", "H100")
