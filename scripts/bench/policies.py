"""Time to first token (TTFT) by policy, in virtual time: the real scheduler over a trace, without model or device.

    python scripts/bench/policies.py --trace AzureLLMInferenceTrace_conv_2023.csv --json policies.json

The trace is of a form that `simulation/loads/traces.py` reads. Its time stamps and pairs of lengths are replayed; one
factor stretches time so that `--load` = seconds in which one mesh prefills all prompts in full steps / seconds from the
first arrival to the last / prefill meshes of the topology.

A step takes `--step` seconds and so many more for each token or row: `--token` of a prompt, `--row` of decode
(`virtual_engine.py`). A transfer takes no time once its gather's turn has come. Prompts share nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.events import Arrived, RequestFacts
from twinmesh.engine.scheduler.policy import POLICIES, Policy, policy_named
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.loads.scaling import first, stretched
from twinmesh.engine.simulation.loads.traces import read_trace
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.engine.topology import Topology
from twinmesh.scripts.bench.virtual_engine import StepTime, VirtualEngine

_SLOTS = 256
_PAGES = _SLOTS * 2048 // 64  # of a mesh: as many requests of 2,048 tokens, or one of the longest


class Figures(NamedTuple):
    """Percentiles of the time to first token, in seconds."""

    p50: float
    p99: float


def at_load(arrivals: Sequence[WorkRequest], load: float, times: StepTime, meshes: int = 1) -> list[WorkRequest]:
    """Stretch the arrivals' times so that prefilling them keeps `meshes` meshes busy for the share `load` of the time.

    Raises:
        ValueError: `load` is not above 0, or the last request arrives no later than the first.
    """
    if not load > 0:
        raise ValueError(f"load={load} is not usable: give a share of prefill capacity above 0, such as 0.8.")
    if not arrivals[-1].time > 0:
        raise ValueError("the trace's last request comes no later than its first: time cannot be stretched to a load.")
    return stretched(arrivals, prefill_seconds(arrivals, times) / meshes / load / arrivals[-1].time)


def prefill_seconds(arrivals: Sequence[WorkRequest], times: StepTime) -> float:
    """Return the seconds in which one mesh prefills all prompts in full steps."""
    return sum(arrival.prompt_len for arrival in arrivals) * (times.token + times.step / times.chunk)


def simulate(arrivals: Sequence[WorkRequest], policy: Policy, times: StepTime, topology: str) -> list[float]:
    """Run all requests to their end and return their times to first token, in seconds, in order of arrival."""
    longest = max(arrival.prompt_len + arrival.output_len for arrival in arrivals)
    config = EngineConfig(
        Topology.parse(topology),
        max_model_len=longest,
        max_num_seqs=_SLOTS,
        prefill_buckets=(times.chunk,),
        decode_buckets=(_SLOTS,),
        prefix_cache=False,
    )
    pool = PoolSize((max(_PAGES, config.max_pages),), (1,), staging_bytes=8 * config.max_pages)
    engine = VirtualEngine(Scheduler(config, [pool] * len(config.topology.meshes), policy), times)
    for number, arrival in enumerate(arrivals):
        engine.post(Arrived(arrival.time, RequestFacts(number, arrival.prompt_len, arrival.output_len)))
    return [request.timeline.ttft for request in engine.run() if request.timeline.ttft is not None]


def compare(
    arrivals: Sequence[WorkRequest], names: Sequence[str], times: StepTime, topology: str
) -> dict[str, Figures]:
    """Run the trace under each policy and return the figures of each."""
    return {name: figures(simulate(arrivals, policy_named(name), times, topology)) for name in names}


def figures(ttft: Sequence[float]) -> Figures:
    """Return p50 and p99 of these times."""
    cuts = quantiles(ttft, n=100, method="inclusive")
    return Figures(cuts[49], cuts[98])


def main(argv: Sequence[str] | None = None) -> int:
    """Print p50 and p99 of TTFT by policy, and their ratios to first come first served; `--json` writes them."""
    args = _arguments(argv)
    times = StepTime(args.step, args.token, args.row, args.chunk)
    try:
        meshes = sum(spec.prefills for spec in Topology.parse(args.topology).meshes)
        trace = read_trace(args.trace)
        requests = list((trace if args.requests is None else first(trace, args.requests)).requests)
        arrivals = at_load(requests, args.load, times, meshes)
    except (OSError, ValueError) as error:
        print(f"policies: {error}", file=sys.stderr)
        return 2
    found = compare(arrivals, list(POLICIES), times, args.topology)
    base = found["fcfs"]
    for name, (p50, p99) in found.items():
        print(
            f"{name:<6} P50 {p50:9.3f} s ({p50 / base.p50:.3f}x)   P99 {p99:9.3f} s ({p99 / base.p99:.3f}x)", flush=True
        )
    if args.json:
        rows = {
            name: {"p50": p50, "p99": p99, "p50_ratio": p50 / base.p50, "p99_ratio": p99 / base.p99}
            for name, (p50, p99) in found.items()
        }
        Path(args.json).write_text(json.dumps({"args": vars(args), "requests": len(arrivals), "ttft": rows}, indent=1))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", required=True, help="a file as Azure or Mooncake publishes it")
    parser.add_argument("--load", type=float, default=0.8, help="share of the trace that prefill is busy (0.8)")
    parser.add_argument("--requests", type=int, help="only the first so many requests (all)")
    parser.add_argument("--topology", default="prefill=1,decode=1", help="meshes (prefill=1,decode=1)")
    parser.add_argument("--step", type=float, default=StepTime.step, help="seconds of every step (%(default)s)")
    parser.add_argument("--token", type=float, default=StepTime.token, help="seconds a prompt token (%(default)s)")
    parser.add_argument("--row", type=float, default=StepTime.row, help="seconds a decode row (%(default)s)")
    parser.add_argument("--chunk", type=int, default=StepTime.chunk, help="tokens of a full prefill step (%(default)s)")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
