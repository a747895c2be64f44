"""Decode steps that are taken in many at once: every record is that of a run in which each is an event."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_fields
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from twinmesh.engine.simulation.incidents import Aborted, MeshFails, RolesCalled
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Topology

PAGE = 8


DEVICES = HostCost()
CALLERS = HostCost(arrival=1.3e-4, token=1.1e-6, idle=7.3e-4)  # they wait for themselves alone


def costs(mesh, host=DEVICES):
    """Costs that no two meshes share: steps of two that began together would end together."""
    slow = 1 + 0.0137 * mesh
    fused = dict(row=0.00013 * slow, chunk=0.0007, pair=1.3e-6, context=1.7e-6)
    return CostModel(
        prefill={n: ProgramCost(0.00037 * n * slow, 0.0007, 1.3e-6) for n in (32, 64)},
        decode={n: ProgramCost((0.0041 + 0.0003 * n) * slow, row=0.00011, context=1.7e-6) for n in (1, 4, 16)},
        fused={n: ProgramCost(0.00039 * n * slow, **fused) for n in (32, 64)},
        link=LinkCost(0.0013, 3.1e-8),
        host=host,
    )


TOPOLOGIES = ("both=1", "prefill=1,decode=1", "prefill=1,decode=3", "pool=3xtp1", "both=2", "both(mode=fused)=2")


def engine(topology, pages, host=DEVICES):
    config = EngineConfig(
        Topology.parse(topology), max_model_len=256, page_size=PAGE, max_num_seqs=16, prefill_buckets=(32, 64),
        decode_buckets=(1, 4, 16),
    )  # fmt: skip
    pool = PoolSize((pages,), (1000,), 200_000)
    meshes = len(config.topology.meshes)
    return SimulatedEngine(config, (pool,) * meshes, tuple(costs(mesh, host) for mesh in range(meshes)))


def run(requests, topology="both=1", pages=200, *, folded, host=DEVICES, **options):
    done = simulate(Workload("test", requests, PAGE), engine(topology, pages, host), folded=folded, **options)
    return done, sorted(done.records, key=lambda record: record.number)


def both(*args, **options):
    """Run folded and not; return the first, having compared the two to the last bit."""
    folded, records = run(*args, folded=True, **options)
    plain, expected = run(*args, folded=False, **options)
    assert records == expected
    assert folded.busy == plain.busy
    assert folded.metrics.steps == plain.metrics.steps
    assert folded.metrics.preemptions == plain.metrics.preemptions
    assert folded.roles == plain.roles
    assert not plain.folded_steps
    return folded


times = st.integers(0, 3_000_000).map(lambda n: n / 1_000_003 + 1e-9 * n**0.5)  # no two steps meet an arrival
services = st.sampled_from([Service()] * 6 + [Service(priority=1), Service(is_batch=True)])
requests = st.builds(
    lambda at, prompt_len, output_len, family, service: (at, prompt_len, output_len, family, service),
    times, st.integers(1, 120), st.integers(1, 80), st.integers(0, 6), services,
)  # fmt: skip


@st.composite
def loads(draw):
    found = sorted(draw(st.lists(requests, min_size=1, max_size=16)), key=lambda one: one[0])
    has_services = draw(st.booleans())
    return [
        WorkRequest(
            prompt_len, output_len, at=at,
            blocks=tuple(family * 100 + block for block in range(-(-(prompt_len + output_len) // PAGE)))
            if family < 3 else (),
            service=service if has_services else Service(),
        )
        for at, prompt_len, output_len, family, service in found
    ]  # fmt: skip


incidents = st.lists(
    st.one_of(
        st.builds(Aborted, times, st.integers(0, 15)),
        st.builds(MeshFails, times, st.just(0)),
        st.builds(RolesCalled, times, st.sampled_from(["prefill=1,decode=2", "both=1,decode=2", "both=3"])),
    ),
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(
    loads(), st.sampled_from(TOPOLOGIES), st.sampled_from([34, 60, 200]), incidents, st.sampled_from([0.0, 0.1]),
    st.sampled_from([DEVICES, CALLERS]),
)  # fmt: skip
def test_a_folded_run_has_the_same_records_to_the_last_bit(requests, topology, pages, incidents, noise, host):
    if "pool" not in topology:
        incidents = [incident for incident in incidents if not isinstance(incident, RolesCalled)]
    both(requests, topology, pages, incidents=incidents, noise=noise, host=host)


def test_most_steps_of_a_long_answer_are_folded():
    done = both([WorkRequest(10, 100, at=0.0), WorkRequest(20, 100, at=0.3)])
    assert done.folded_steps > 0.7 * done.metrics.steps


def test_one_fold_goes_on_over_the_pages_that_its_rows_take():
    done = both([WorkRequest(10, 100, at=0.0), WorkRequest(20, 100, at=0.3)])
    assert done.folded_steps / done.folds > 4 * PAGE


def test_a_fold_ends_where_rows_find_no_page():
    done = both([WorkRequest(60, 80, at=0.0), WorkRequest(60, 90, at=0.001), WorkRequest(60, 70, at=0.002)], pages=34)
    assert done.metrics.preemptions
    assert done.folded_steps


def test_what_callers_take_hinders_no_fold():
    assert both([WorkRequest(10, 100, at=0.0)], host=CALLERS).folded_steps


def test_nothing_is_folded_where_the_host_takes_time_for_steps():
    slow = replace(engine("both=1", 200), costs=replace_fields(costs(0), host=HostCost(step=0.001)))
    done = simulate(Workload("test", [WorkRequest(10, 100, at=0.0)], PAGE), slow)
    assert not done.folded_steps
