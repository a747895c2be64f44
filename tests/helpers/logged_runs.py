"""Decision logs with stamps, of runs that were simulated: text that any of the log's readers takes."""

import io
from random import Random

from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from twinmesh.engine.scheduler.decision_log import DecisionLog, RunFacts
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Topology
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope

MODEL = ModelConfig("llama", 64, 32, 32, 8, 2, 8, 1e-5, False, 128, (AttentionSpec(Rope(1e4)),))
FACTS = RunFacts(MODEL, "tiny", "no device")
BUCKETS = (64, 256, 512)
COSTS = CostModel(
    {size: ProgramCost(2e-3 + size * 1e-4, 1e-4, 1e-8) for size in BUCKETS},
    {size: ProgramCost(8e-3, row=2e-4, context=1e-8) for size in (1, 8)},
    {size: ProgramCost(1e-2 + size * 1e-4, 1e-4, 1e-8, 2e-4, 1e-8) for size in BUCKETS},
    LinkCost(1e-3, 1e-8),
    HostCost(),
)


def config_of(topology, **changes):
    options = dict(page_size=16, max_num_seqs=8, decode_buckets=(1, 8)) | changes
    return EngineConfig(Topology.parse(topology), 2048, **options)


def engine_of(config, pages=300, costs=COSTS):
    pools = tuple(PoolSize((pages,), (1000,), 10**6, 10) for _ in config.topology.meshes)
    return SimulatedEngine(config, pools, costs)


def mixed_load(count=60, rate=30.0, seed=1):
    """Prompts of all lengths, some that begin alike, and one in seven that waits for another's end."""
    random, t, requests = Random(seed), 0.0, []
    for number in range(count):
        prompt, output = random.randint(5, 900), random.randint(1, 60)
        if number % 7 == 6:
            requests.append(WorkRequest(prompt, output, None, number - 3, 0.01))
            continue
        requests.append(WorkRequest(prompt, output, t, blocks=(1, 100 + number) if number % 2 else ()))
        t += random.expovariate(rate)
    return Workload("mixed", requests, 256)


def simulated(engine, workload, **options):
    """Simulate; return the log's text, and what became of it."""
    file = io.StringIO()
    result = simulate(workload, engine, log=DecisionLog(file, FACTS), **options)
    return file.getvalue(), result


def opened(text, name="run.log"):
    """The log as an open file of this name."""
    file = io.StringIO(text)
    file.name = name
    return file
