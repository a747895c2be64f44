"""Where requests go: the engine's own choice of meshes against simpler ones, over recorded traces in virtual time.

    python scripts/bench/routing.py --traces TRACE.csv TRACE.jsonl --json routing.json

The real scheduler replays the first `--requests` of each trace (as `loads/traces.py` reads them) on meshes whose
steps take the time that `virtual_engine.py` says: an 8-billion-parameter model on an H100 each, with 8,192 pages of 64
tokens and 256 slots, and 0.02 ms a page for transfers. Steps prefill at most 512 tokens. Prompts share what the trace's
ids say; what an answer adds to the cache is not reused, since no trace says where it comes again.

One factor stretches the trace's times, so that requests come at `--load` times the rate at which the meshes serve them
when all come at once (from the first to the last but a tenth, placed by least load): the same times for every rank. The
rivals (`ranks.py`): round robin, least load, longest prefix first, and the rank of commit efd1214.

Reported: TTFT and TPOT, hits (prompt tokens found cached / prompt tokens), busy (the share of time in which meshes run
steps, until the last arrival), and `most`: of all minutes until the last arrival, one beginning every second, the most
that one mesh did as a multiple of the mean of the meshes with its role. What a mesh does is counted in seconds, the
prompt tokens and rows of its steps at their price each, and in `most_busy` as seconds of its steps. `alone` is the TTFT
of the same prompts on a mesh of their own each that has nothing cached: what no choice of a mesh shortens but by hits.

`ratios` are ours to the best rival in each figure: TTFT at P99 should be at most 0.8 and hits at least 0.9, and `most`
at most 1.5.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.metrics.distribution import Distribution
from twinmesh.engine.metrics.metrics import Latencies
from twinmesh.engine.protocol.actions import DecodeRow
from twinmesh.engine.protocol.events import Arrived, RequestFacts
from twinmesh.engine.scheduler.policy import FCFS, Policy
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.loads.scaling import first, stretched
from twinmesh.engine.simulation.loads.traces import MOONCAKE_BLOCK, read_trace
from twinmesh.engine.simulation.workload import WorkRequest, page_hashes
from twinmesh.engine.topology import Topology
from twinmesh.scripts.bench.ranks import LeastLoad, LongestPrefixFirst, RankOfEfd1214, RoundRobin
from twinmesh.scripts.bench.virtual_engine import Step, StepTime, VirtualEngine, prompt_tokens, sampling_rows

OURS = "ours"
RANKS = (OURS, "round robin", "least load", "longest prefix", "efd1214")
TOPOLOGIES = ("both=8", "prefill=4,decode=4")
TIMES = StepTime(page=2e-5)
_SLOTS, _PAGES, _PAGE = 256, 8192, 64
_MINUTE = 60  # bins of a second
# What is asked for: ours to the best rival's, and the most of one mesh to the mean.
MOST_TTFT, LEAST_HITS, MOST_LOAD = 0.8, 0.9, 1.5


def rank(name: str, topology: Topology) -> Policy:
    """Make the policy that ranks meshes in this way."""
    made: dict[str, Policy] = {
        OURS: FCFS,
        "round robin": RoundRobin(topology.meshes),
        "least load": LeastLoad(),
        "longest prefix": LongestPrefixFirst(),
        "efd1214": RankOfEfd1214(),
    }
    return made[name]


class Work:
    """What each mesh did in each second: seconds of steps, and the price of their tokens and rows."""

    def __init__(self, times: StepTime):
        """Begin without steps."""
        self._times = times
        self._busy: dict[tuple[int, int], float] = defaultdict(float)
        self._work: dict[tuple[int, int], float] = defaultdict(float)

    def observe(self, begin: float, end: float, step: Step) -> None:
        """Count a step, in the second in which it ends."""
        at = step.mesh, int(end)
        self._busy[at] += end - begin
        rows = sum(tokens for row, tokens in sampling_rows(step) if isinstance(row, DecodeRow))
        self._work[at] += (self._times.token + self._times.step / self._times.chunk) * prompt_tokens(step)
        self._work[at] += self._times.row * rows

    def busy_share(self, seconds: int, meshes: int) -> float:
        """Return the share of the first seconds in which the meshes ran steps."""
        return float(_table(self._busy, seconds, meshes).sum() / seconds / meshes)

    def most(self, seconds: int, roles: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Return the most that a mesh did in any minute as a multiple of its role's mean: by work, and by busy time."""
        meshes = sum(map(len, roles))
        tables = [_table(cells, seconds, meshes) for cells in (self._work, self._busy)]
        work, busy = (max(_most(table[:, list(role)]) for role in roles) for table in tables)
        return work, busy


def _table(cells: Mapping[tuple[int, int], float], seconds: int, meshes: int) -> np.ndarray:
    table = np.zeros((seconds, meshes))  # [seconds, meshes]
    for (mesh, second), value in cells.items():
        if second < seconds:
            table[second, mesh] = value
    return table


def _most(table: np.ndarray) -> float:
    """Return the most of one column in any minute, or in all if that is shorter, over the mean of the columns."""
    sums = np.cumsum(np.vstack([np.zeros(table.shape[1]), table]), axis=0)
    width = min(_MINUTE, len(table))
    minutes = sums[width:] - sums[:-width]  # [minutes, meshes]
    means = minutes.mean(axis=1)
    return float(np.max(minutes.max(axis=1)[means > 0] / means[means > 0], initial=1.0))


def make(arrivals: Sequence[WorkRequest], topology: Topology, policy: Policy) -> Scheduler:
    """Make the scheduler of meshes that hold what these requests need."""
    config = EngineConfig(
        topology,
        max_model_len=max(arrival.prompt_len + arrival.output_len for arrival in arrivals),
        page_size=_PAGE,
        max_num_seqs=_SLOTS,
        prefill_buckets=(TIMES.chunk,),
        decode_buckets=(_SLOTS,),
    )
    pool = PoolSize((max(_PAGES, config.max_pages),), (1,), staging_bytes=8 * config.max_pages)
    return Scheduler(config, [pool] * len(topology.meshes), policy)


def replay(arrivals: Sequence[WorkRequest], scheduler: Scheduler, work: Work | None = None) -> VirtualEngine:
    """Run all requests to their end."""
    engine = VirtualEngine(scheduler, TIMES, None if work is None else work.observe)
    for number, arrival in enumerate(arrivals):
        facts = RequestFacts(
            number,
            arrival.prompt_len,
            arrival.output_len,
            page_hashes(arrival.blocks, MOONCAKE_BLOCK, arrival.prompt_len, _PAGE),
        )
        engine.post(Arrived(arrival.time, facts))
    engine.run()
    return engine


def at_load(arrivals: Sequence[WorkRequest], load: float, topology: Topology) -> list[WorkRequest]:
    """Stretch the arrivals' times to `load` times the rate at which the meshes serve them when all come at once."""
    at_once = stretched(arrivals, 0.0)
    requests = replay(at_once, make(arrivals, topology, LeastLoad())).requests
    ends = sorted(request.timeline.finish for request in requests if request.timeline.finish is not None)
    most = int(0.9 * len(ends))
    seconds = ends[most - 1] * len(ends) / most  # the last run with meshes half empty
    return stretched(arrivals, seconds / load / arrivals[-1].time)


def measure(arrivals: Sequence[WorkRequest], topology: Topology, policy: Policy) -> dict[str, Any]:
    """Replay the arrivals with a policy; return the figures."""
    scheduler, work = make(arrivals, topology, policy), Work(TIMES)
    requests = replay(arrivals, scheduler, work).requests
    found = Latencies.of(request.timeline for request in requests)
    seconds, counters = max(1, int(arrivals[-1].time)), scheduler.counters
    roles = [
        [index for index, spec in enumerate(topology.meshes) if (spec.prefills, spec.decodes) == role]
        for role in sorted({(spec.prefills, spec.decodes) for spec in topology.meshes})
    ]
    most, most_busy = work.most(seconds, roles)
    return {
        "ttft": _percentiles(found.ttft),
        "tpot": _percentiles(found.tpot),
        "hits": counters.cached_tokens / max(1, counters.prompt_tokens),
        "most": most,
        "most_busy": most_busy,
        "busy": work.busy_share(seconds, len(topology.meshes)),
        "preemptions": counters.preemptions,
    }


def alone(arrivals: Sequence[WorkRequest]) -> Distribution | None:
    """Return the times to first token of these prompts on empty meshes."""
    return Distribution.of(
        TIMES.step * -(-arrival.prompt_len // TIMES.chunk) + TIMES.token * arrival.prompt_len for arrival in arrivals
    )


def _percentiles(values: Distribution | None) -> dict[str, float]:
    return {} if values is None else {"p50": values.p50, "p99": values.p99}


def verdict(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Hold ours against the best rival in each figure."""
    ours, rivals = rows[OURS], [row for name, row in rows.items() if name != OURS]
    ttft = ours["ttft"]["p99"] / min(row["ttft"]["p99"] for row in rivals)
    best = max(row["hits"] for row in rivals)
    hits = ours["hits"] / best if best else 1.0
    return {
        "ttft_p99_ratio": ttft,
        "hits_ratio": hits,
        "most": ours["most"],
        "is_met": ttft <= MOST_TTFT and hits >= LEAST_HITS and ours["most"] <= MOST_LOAD,
    }


def compare(arrivals: Sequence[WorkRequest], topology: Topology, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure every rank over the same arrivals, and print a line for each."""
    rows = {}
    for name in names:
        start = time.perf_counter()
        rows[name] = measure(arrivals, topology, rank(name, topology))
        print(f"  {name:15}", _line(rows[name]), f"({time.perf_counter() - start:.0f} s)", flush=True)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    ttft, tpot = row["ttft"], row["tpot"]
    return (
        f"TTFT P50 {ttft['p50']:7.3f} s P99 {ttft['p99']:8.3f} s  TPOT P50 {1e3 * tpot['p50']:5.1f} ms "
        f"P99 {1e3 * tpot['p99']:6.1f} ms  hits {row['hits']:.3f}  most {row['most']:.2f} busy {row['most_busy']:.2f} "
        f"of {row['busy']:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the ranks on every trace and topology; return the exit code."""
    args = _arguments(argv)
    found = []
    try:
        for path in args.traces:
            trace = list(first(read_trace(path), args.requests).requests)
            if not trace[-1].time > 0:
                raise ValueError(f"{path}: the last request comes no later than the first: give more requests.")
            for text in args.topologies:
                found.append({"trace": Path(path).name, "topology": text} | _measure_all(trace, text, path, args))
    except (OSError, ValueError) as error:
        print(f"routing: {error}", file=sys.stderr)
        return 2
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "found": found}, indent=1))
    return 0


def _measure_all(trace: Sequence[WorkRequest], text: str, path: str, args: argparse.Namespace) -> dict[str, Any]:
    topology = Topology.parse(text)
    arrivals = at_load(trace, args.load, topology)
    rate, least = len(arrivals) / arrivals[-1].time, _percentiles(alone(arrivals))
    print(f"{Path(path).name}, {text}: {len(arrivals)} requests, {rate:.2f}/s, alone {least['p99']:.3f} s at P99")
    rows = compare(arrivals, topology, args.ranks)
    result: dict[str, Any] = {"requests": len(arrivals), "rate": rate, "alone": least, "rows": rows}
    if OURS in rows and len(rows) > 1:
        result["ratios"] = verdict(rows)
        print("  ours to the best: TTFT P99 {ttft_p99_ratio:.3f}, hits {hits_ratio:.3f}".format(**result["ratios"]))
    return result


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--traces", nargs="+", required=True, metavar="FILE", help="as Azure or Mooncake publishes them"
    )
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, help=f"default: {' '.join(TOPOLOGIES)}")
    parser.add_argument("--ranks", nargs="+", default=RANKS, choices=RANKS, help="those to compare (all)")
    parser.add_argument("--load", type=float, default=0.8, help="share of what the meshes can serve (default: 0.8)")
    parser.add_argument("--requests", type=int, default=4000, help="only the first so many of a trace (default: 4000)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
