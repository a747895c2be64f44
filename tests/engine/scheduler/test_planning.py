"""The planner in an engine, which a simulation drives: roles follow the load, a caller's hold, and a log replays."""

import io
import random
from itertools import accumulate

import pytest
from helpers.simulated import costs, engine
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.roles import starting_roles
from twinmesh.engine.scheduler.cost_model import ProgramCost
from twinmesh.engine.scheduler.decision_log import DecisionLog
from twinmesh.engine.scheduler.planner import RULES
from twinmesh.engine.simulation.incidents import RolesCalled
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.engine.simulation.simulator import simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Topology

TARGET = SLO(ttft_ms=5000, tpot_ms=80, percentile=90)
PROMPTS, ANSWERS = (600, 4), (40, 40)  # lengths of prompt and answer
RATE = 1.5  # of such prompts, each of which takes a mesh 1.2 s
COSTS = costs(decode={8: ProgramCost(0.05)})


def pool(meshes=4, roles=None, slo=TARGET, **options):
    topology = Topology.parse(f"pool={meshes}")
    return engine(str(topology), COSTS, slo=slo, roles=starting_roles(roles, topology), **options)


def requests(lengths, rate, begin, seconds):
    return [WorkRequest(*lengths, at=begin + number / rate) for number in range(int(rate * seconds))]


def run(work, on, **options):
    return simulate(Workload("test", work), on, **options)


def test_roles_follow_the_load_and_the_log_replays_with_its_reasons():
    work = requests(PROMPTS, RATE, 0.0, 40) + requests(ANSWERS, 7, 40.0, 45)
    log = io.StringIO()
    done = run(work, pool(roles="prefill=1,decode=3"), log=DecisionLog(log))
    shares = [(t, roles.count("prefill")) for t, roles in done.roles]
    assert max(share for t, share in shares if t < 40) >= 2  # long prompts with short answers: more meshes prefill
    assert shares[-1][1] < max(share for _, share in shares)  # short prompts with long answers: fewer do
    assert sum(done.metrics.planned_flips.values()) == done.metrics.flips
    assert done.metrics.plan is not None
    lines = log.getvalue()
    assert '"type":"Planned"' in lines
    again = replay(io.StringIO(lines))
    assert again.scheduler.roles() == list(done.metrics.roles)
    assert again.scheduler.plan == done.metrics.plan


def test_more_requests_keep_to_the_target_than_under_the_roles_at_the_start():
    work = requests(PROMPTS, RATE, 0.0, 60)
    target = SLO(ttft_ms=TARGET.ttft_ms, tpot_ms=TARGET.tpot_ms)  # without a percentile nobody plans
    fixed, planned = (run(work, pool(roles="prefill=1,decode=3", slo=slo)) for slo in (target, TARGET))
    assert fixed.metrics.flips == 0
    assert fixed.metrics.plan is None
    assert planned.metrics.met_slo > 2 * fixed.metrics.met_slo


def test_a_callers_roles_hold_for_the_dwell():
    work = requests(PROMPTS, RATE, 0.0, 65)
    called = RolesCalled(31.0, "prefill=1,decode=3")
    done = run(work, pool(roles="prefill=3,decode=1"), incidents=[called])
    changes = [(t, roles) for t, roles in done.roles if t >= 31.0]
    assert changes[0][1].count("prefill") == 1
    assert changes[1][0] >= 31.0 + RULES.dwell


def test_bursts_that_no_roles_can_serve_in_time_change_no_roles():
    generator = random.Random(2)
    work = [
        WorkRequest(*(PROMPTS if generator.random() < 0.5 else ANSWERS), at=10.0 * burst + generator.random())
        for burst in range(12)
        for _ in range(60)  # 36 s of four meshes
    ]
    done = run(sorted(work, key=lambda request: request.at), pool(), noise=0.1, seed=1)
    assert "no roles meet the target" in done.metrics.plan or done.metrics.met_slo < 0.5 * len(work)
    assert done.metrics.flips <= 4  # once, at most


def test_few_arrivals_change_nothing_and_an_idle_engine_has_nothing_to_wake_for():
    done = run(requests(PROMPTS, 0.1, 0.0, 60), pool(roles="prefill=1,decode=3"))
    assert done.metrics.flips == 0
    assert "too few requests" in done.metrics.plan


def test_a_pool_of_one_mesh_has_no_roles_to_plan():
    with pytest.raises(ValueError, match="pool of one mesh has no roles to plan"):
        pool(1)


def test_roles_do_not_come_and_go_under_a_steady_load_with_noise():
    generator = random.Random(1)
    times = list(accumulate(generator.expovariate(3.0) for _ in range(400)))
    work = [WorkRequest(*(PROMPTS if generator.random() < 0.3 else ANSWERS), at=t) for t in times]
    done = run(work, pool(), noise=0.1, seed=1)
    changes = [tuple(sorted(roles)) for _, roles in done.roles]
    assert times[-1] > 100
    assert len(changes) <= 3
    assert len(changes) == len(set(changes))
