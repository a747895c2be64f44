"""Small simulated engines whose times are easily added up by hand, and loads for them."""

from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.scheduler.cost_model import CostModel, LinkCost, ProgramCost
from twinmesh.engine.simulation.simulator import SimulatedEngine
from twinmesh.engine.simulation.workload import Workload
from twinmesh.engine.topology import Topology

PAGE = 16


def costs(**changes):
    """A prefill step of up to 64 tokens takes 0.1 s, of up to 256 0.4 s; a decode step 0.01; a transfer 1 ms and 1 us
    a byte."""
    steps = {64: ProgramCost(0.1), 256: ProgramCost(0.4)}
    parts = {"prefill": steps, "decode": {8: ProgramCost(0.01)}, "fused": steps, "link": LinkCost(0.001, 1e-6)}
    return CostModel(**parts | changes)


def engine(topology="both=1", prices=None, pages=512, **options):
    """An engine with `pages` pages of 1,000 bytes on each mesh."""
    sizes = {
        "max_model_len": 1024, "page_size": PAGE, "max_num_seqs": 8,
        "prefill_buckets": (64, 256), "decode_buckets": (8,),
    }  # fmt: skip
    config = EngineConfig(Topology.parse(topology), **sizes | options)
    pool = PoolSize((pages,), (1000,), 1_000_000 if config.has_handoffs else 0)
    return SimulatedEngine(config, (pool,) * len(config.topology.meshes), prices or costs())


def load(*requests):
    """A workload of these requests, whose blocks are pages."""
    return Workload("test", requests, PAGE)
