"""What the simulator costs: wall time of simulated requests, by topology, on one core.

    python scripts/bench/simulation.py --trace AzureLLMInferenceTrace_conv_2023.csv --json simulation.json
    python scripts/bench/simulation.py --trace TRACE.csv --runs pool=256*50 --requests 1000000
    python scripts/bench/simulation.py --trace TRACE.csv --runs prefill=16,decode=48*10 --aisimulate AIS

A run is a topology, and how often the trace is superimposed on itself. Each is a process of its own on one core, of
devices alone: the host takes no time, as with AISimulate (one thread could not serve 256 meshes). Steps cost what the
published peaks of `--device` say.

Reported: seconds of `simulate`, CPU time; requests per second and microseconds a request; scheduler actions a request
and microseconds an action, engine messages a request; decode and prefill steps a request, the share of them that was
folded, steps a fold (`simulation/folding.py`); the process's peak memory. With `--unfolded` each run is made a second
time with every step an event, and the two have to have the same records. With `--aisimulate` (an environment that has
it, see `simulators.py`) requests per second beside its own, by the time that it states for its replay; each `--rounds`
times in turn, the best counts.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace as replace_fields
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.scheduler.cost_model import HostCost
from twinmesh.engine.scheduler.policy import FCFS
from twinmesh.engine.simulation.assemble import assemble, source_of
from twinmesh.engine.simulation.loads.scaling import first, superimposed
from twinmesh.engine.simulation.loads.traces import read_trace
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import Workload
from twinmesh.models.checkpoints.known_models import known_model
from twinmesh.scripts.bench import simulator_runs
from twinmesh.scripts.bench.simulator_runs import Setting

MODEL = "meta-llama/Meta-Llama-3.1-8B"
RUNS = ("prefill=1,decode=1*1", "prefill=16,decode=48*10", "pool=256*50", "pool=2048*400")


class Case(NamedTuple):
    """One run."""

    topology: str
    copies: int  # of the trace at once
    requests: int | None  # the first so many; None: all
    trace: str
    device: str
    folded: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each run, and return the exit code."""
    args = _arguments(argv)
    rows = []
    for text in args.runs:
        topology, _, copies = text.partition("*")
        case = Case(topology, int(copies or 1), args.requests, args.trace, args.device)
        rows.append(_measured(case, args))
        print(_line(rows[-1]), flush=True)
    if args.json is not None:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def _measured(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one run, beside what is asked for."""
    rows, peer = [], []
    for _ in range(args.rounds):
        rows.append(_alone(args.core, _simulated, case))
        if args.aisimulate is not None:
            setting = Setting(MODEL, case.device, case.topology, case.trace, case.copies, case.requests)
            peer.append(simulator_runs.aisimulate_on_trace(Path(args.aisimulate), setting, args.core))
    row = max(rows, key=lambda row: float(row["requests_per_second"]))
    if args.unfolded:
        plain = _alone(args.core, _simulated, case._replace(folded=False))
        if plain["digest"] != row["digest"]:
            raise RuntimeError(f"{case.topology}: a folded run has other records than one that is not")
        row["unfolded_seconds"] = plain["seconds"]
    if peer:
        best = max(found["requests_per_second"] for found in peer)
        row["aisimulate_requests_per_second"], row["ratio"] = best, row["requests_per_second"] / best
    return row


def _alone[T](core: int, call: Callable[[Case], T], case: Case) -> T:
    """Call in a process of its own, on one core."""
    with ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, {core})) as pool:
        return pool.submit(call, case).result()


def engine_of(topology: str, device: str, model: str = MODEL, **options: Any) -> SimulatedEngine:
    """Make an engine of devices alone."""
    asked = EngineOptions(model, topology=topology, **options)
    engine = assemble(model, known_model(model), asked, source_of(device, None), FCFS)
    return replace(engine, costs=tuple(replace_fields(c, host=HostCost()) for c in engine.costs_of_meshes))


def _simulated(case: Case) -> dict[str, Any]:
    workload = read_trace(case.trace)
    if case.copies > 1:
        workload = superimposed(workload, case.copies)
    if case.requests is not None:
        workload = first(workload, case.requests)
    count = sum(1 for _ in workload.requests)
    engine = engine_of(case.topology, case.device)
    begin, cpu = time.perf_counter(), time.process_time()
    done = simulate(Workload(workload.name, workload.requests), engine, folded=case.folded)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    steps = done.metrics.steps
    finish = done.records.column("finish")
    return {
        "topology": case.topology, "copies": case.copies, "requests": count, "meshes": len(engine.pools),
        "seconds": seconds, "cpu_seconds": cpu,
        "requests_per_second": count / seconds, "us_per_request": 1e6 * seconds / count,
        "decisions_per_request": done.decisions / count, "us_per_decision": 1e6 * seconds / max(1, done.decisions),
        "events_per_request": done.events / count, "steps_per_request": steps / count,
        "folded_share": done.folded_steps / max(1, steps), "steps_per_fold": done.folded_steps / max(1, done.folds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ttft_p50": done.metrics.latencies.ttft.p50 if done.metrics.latencies.ttft is not None else None,
        "virtual_seconds": done.seconds, "digest": float(finish.sum()).hex(),
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    text = (
        "{topology}*{copies}: {requests:,} requests on {meshes:,} meshes in {seconds:.1f} s (CPU {cpu_seconds:.1f}), "
        "{requests_per_second:,.0f}/s, {us_per_request:.0f} us each; {decisions_per_request:.1f} decisions of "
        "{us_per_decision:.0f} us, {events_per_request:.1f} events, {steps_per_request:.1f} steps, {folded_share:.0%} "
        "folded, {steps_per_fold:.1f} a fold; {peak_mb:,.0f} MB"
    ).format(**row)
    if "unfolded_seconds" in row:
        text += f"; unfolded {row['unfolded_seconds']:.1f} s"
    if "ratio" in row:
        text += f"; AISimulate {row['aisimulate_requests_per_second']:,.0f}/s, ratio {row['ratio']:.2f}"
    return text


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", metavar="FILE", required=True, help="a trace, as `twinmesh simulate` reads them")
    parser.add_argument(
        "--runs", metavar="TOPOLOGY*COPIES", nargs="+", default=list(RUNS), help=f"default: {' '.join(RUNS)}"
    )
    parser.add_argument("--requests", metavar="N", type=int, help="the first N requests of each run (all)")
    parser.add_argument("--device", default="h100", help="default: %(default)s")
    parser.add_argument("--unfolded", action="store_true", help="compare with a run in which every step is an event")
    parser.add_argument("--aisimulate", metavar="FOLDER", help="an environment that has AISimulate (none)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="the CPU core that all run on (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
