"""Costs of programs that were not measured lie between and beyond those that were."""

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.scheduler.cost_model import CostModel, LinkCost, ProgramCost
from twinmesh.engine.simulation.costs.fill import filled
from twinmesh.engine.topology import Topology


def make_config(topology="both=1", prefill=(64, 256, 512), decode=(1, 8, 32)):
    return EngineConfig(Topology.parse(topology), 1024, prefill_buckets=prefill, decode_buckets=decode)


def fixed(costs):
    return {size: program.fixed for size, program in costs.items()}


def test_between_sizes_on_a_line_and_beyond_them_with_its_slope():
    known = {64: ProgramCost(0.1, pair=1e-7), 256: ProgramCost(0.4, pair=2e-7)}
    costs = CostModel(known, {8: ProgramCost(0.02, row=1e-3)}, {}, LinkCost(0, 0))
    found = filled(costs, make_config(prefill=(16, 64, 128, 256, 512)))
    assert fixed(found.prefill) == pytest.approx({16: 0.1, 64: 0.1, 128: 0.2, 256: 0.4, 512: 0.8})
    assert found.prefill[128].pair == 1e-7
    assert found.prefill[512].pair == 2e-7
    assert found.prefill[64] == known[64]
    assert fixed(found.decode) == pytest.approx({1: 0.02, 8: 0.02, 32: 0.08})


def test_a_fused_step_computes_its_rows_as_tokens():
    costs = CostModel(
        {64: ProgramCost(0.1), 512: ProgramCost(0.548)}, {32: ProgramCost(0.02, row=1e-3, context=1e-6)}, {},
        LinkCost(0, 0),
    )  # fmt: skip
    found = filled(costs, make_config("both(mode=fused)=1", prefill=(64, 512)))
    assert found.fused[64] == ProgramCost(pytest.approx(0.132), row=1e-3, context=1e-6)


def test_a_kind_without_any_step_is_refused():
    with pytest.raises(ValueError, match="no decode steps were measured"):
        filled(CostModel({64: ProgramCost(0.1)}, {}, {}, LinkCost(0, 0)), make_config())
