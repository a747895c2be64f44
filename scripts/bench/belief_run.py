"""The real engine's side of `belief.py`: an engine in a process of its own, its profile, and loads that run on it.

Requests are sent at their times whatever happens (open loop), by the driver of `twinmesh bench serve`; prompts are made
up anew for each run, so that nothing is found in a cache, and every answer has the length that was asked for. An
observer sees what steps the engine runs meanwhile.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from twinmesh.engine.api.client import EngineClient
from twinmesh.engine.benchmark import target
from twinmesh.engine.benchmark.driver import LEAD, drive
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.acceptances import Acceptances
from twinmesh.engine.metrics.request_records import RequestRecord
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.simulation.costs.overlaps import Ran
from twinmesh.engine.simulation.costs.profile import Errors
from twinmesh.engine.simulation.costs.step_watch import StepWatch
from twinmesh.engine.simulation.workload import Workload

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.scripts.profile_run import Seen

PROFILE = "profile"  # asks for a measurement


class Served(NamedTuple):
    """An engine that runs, and what a step costs it."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]
    costs: CostModel
    spread: float  # of step times around them
    errors: list[Errors]  # of the costs, for points held out of their fit


class Load(NamedTuple):
    """A load to be run."""

    workload: Workload
    calls: tuple[tuple[float, str], ...]  # for roles, each at its time


class Outcome(NamedTuple):
    """What a run gave."""

    records: list[RequestRecord]
    steps: list[Ran]
    late: float  # seconds by which the latest request was submitted after its time


def serve(connection: Connection, model: str, options: dict[str, Any], is_quick: bool) -> None:
    """Run engines in this process until the other end of the connection says None.

    For each `PROFILE` it measures every load of a profile once more, on an engine that does nothing else, and sends a
    `Served` of all that was measured so; for each `Load` that it gets it sends the `Outcome`.
    """
    from twinmesh import LLM
    from twinmesh.scripts.profile_loads import OnMesh
    from twinmesh.scripts.profile_run import run_loads

    with LLM(model, policy=OnMesh(), **options) as profiled, LLM(model, **options) as llm:
        core, config = llm.engine.core, llm.config
        pools = tuple(core.inspect(lambda scheduler, _: scheduler.pools))
        steps, seen = StepWatch(config, pools, core.clock), list["Seen"]()
        with core.observe(steps):
            while (asked := connection.recv()) is not None:
                if asked == PROFILE:
                    seen += run_loads(profiled, 1, is_quick=is_quick, progress=False)
                    connection.send(_served(config, pools, seen))
                    continue
                steps.ran.clear()
                records, late = run(llm, asked)
                connection.send(Outcome(records, list(steps.ran), late))


def _served(config: EngineConfig, pools: tuple[PoolSize, ...], seen: "Sequence[Seen]") -> Served:
    from twinmesh.scripts.profile_run import errors_of, fitted, held_out, spread_of

    costs = fitted(seen)
    return Served(config, pools, costs, spread_of(seen, costs), errors_of(held_out(seen, costs)))


def run(llm: "LLM", load: Load) -> tuple[list[RequestRecord], float]:
    """Run a load to its end; return what became of its requests, in their order, and by how many seconds the latest
    came too late."""
    core, client = llm.engine.core, EngineClient(llm.engine, seed=0)
    watch = Acceptances(core.clock)
    with core.observe(watch), ThreadPoolExecutor(1) as caller:
        begin = core.clock() + LEAD
        calls = [caller.submit(_call, llm, begin + at, roles) for at, roles in load.calls]
        # Prompts of a seed of their own: nothing of an earlier run is found in the cache.
        driven = drive(client, target.Load(load.workload), watch.accepted, seed=(time.time_ns(),), start=begin)
        _raise_if_failed(calls)
    return sorted(driven.records, key=lambda record: record.number), max(driven.late)


def _call(llm: "LLM", at: float, roles: str) -> None:
    time.sleep(max(0.0, at - llm.clock()))
    llm.set_roles(roles)


def _raise_if_failed(calls: Sequence[Future[None]]) -> None:
    for call in calls:
        call.result()
