"""Workloads through the real core and scheduler in virtual time: when what happens, by hand."""

import pytest
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Topology

PAGE = 16


def costs(**changes):
    """Steps of a model: a prefill of 64 tokens takes 0.1 s, of 256 0.4; a decode step 0.01."""
    return CostModel(
        **{
            "prefill": {64: ProgramCost(0.1), 256: ProgramCost(0.4)},
            "decode": {8: ProgramCost(0.01)},
            "fused": {64: ProgramCost(0.1), 256: ProgramCost(0.4)},
            "link": LinkCost(0.001, 1e-6),
        }
        | changes
    )


def engine(topology="both=1", prices=None, **options):
    config = EngineConfig(
        **{
            "topology": Topology.parse(topology), "max_model_len": 1024, "page_size": PAGE, "max_num_seqs": 8,
            "prefill_buckets": (64, 256), "decode_buckets": (8,),
        } | options
    )  # fmt: skip
    pool = PoolSize((512,), (1000,), 1_000_000 if config.has_handoffs else 0)
    return SimulatedEngine(config, (pool,) * len(config.topology.meshes), prices or costs())


def load(*requests):
    return Workload("test", requests, PAGE)


def test_the_first_token_of_an_empty_engine_takes_host_and_step():
    host = HostCost(arrival=0.002, token=0.00001, step=0.003, row=0.0005, read=0.004)
    done = simulate(load(WorkRequest(100, 3, at=1.0)), engine(prices=costs(host=host)))
    (record,) = done.records
    assert record.ttft == pytest.approx(0.002 + 0.001 + 0.003 + 0.0005 + 0.4 + 0.004)
    assert record.queue + record.prefill + record.host == pytest.approx(record.ttft)
    assert (record.reason, record.output_len) == ("length", 3)


def test_decode_steps_follow_each_other_without_a_gap():
    (record,) = simulate(load(WorkRequest(10, 11, at=0.0)), engine()).records
    assert record.ttft == pytest.approx(0.1)
    assert record.tpot == pytest.approx(0.01)
