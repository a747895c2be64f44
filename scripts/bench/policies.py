"""Time to first token (TTFT) by policy, in virtual time: the real scheduler over a trace, without model or device.

    python scripts/bench/policies.py --trace AzureLLMInferenceTrace_conv_2023.csv --json policies.json

The trace is a CSV with a header and the columns TIMESTAMP, ContextTokens, GeneratedTokens, as Azure publishes it. Its
time stamps and its pairs of lengths are replayed; one factor stretches time so that `--load` = seconds in which one
mesh prefills all prompts in full steps / seconds from the first arrival to the last / prefill meshes of the topology.

A step takes `--step` seconds and so many more for each token or row: `--token` of a prompt, `--row` of decode. The
defaults stand for a model of 8 billion parameters on one H100: 5 ms to read the weights, 20,000 prompt tokens per
second, 0.02 ms for a row's attention. A transfer takes no time once its gather's turn has come. Prompts share nothing.
"""

import argparse
import csv
import heapq
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill, StartTransfer
from twinmesh.engine.protocol.events import Arrived, Event, Outcome, RequestFacts, StepDone, TransferReady
from twinmesh.engine.scheduler.policy import POLICIES, Policy, policy_named
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Topology

_SLOTS = 256
_PAGES = _SLOTS * 2048 // 64  # of a mesh: as many requests of 2,048 tokens, or one of the longest


@dataclass(frozen=True)
class Arrival:
    """A request of the trace."""

    t: float  # seconds from the first one
    prompt_len: int
    max_tokens: int


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, in seconds: a fixed time and so much more for each token and row."""

    step: float = 0.005  # of every step
    token: float = 0.00005  # more for each prompt token
    row: float = 0.00002  # more for each row that decodes
    chunk: int = 512  # tokens of a full prefill step, as engines have by default

    def seconds(self, action: Prefill | Decode | Fused) -> float:
        """Return the seconds that one dispatched action takes."""
        if isinstance(action, Decode):
            return action.steps * (self.step + self.row * len(action.rows))
        rows = len(action.rows) if isinstance(action, Fused) else 0
        return self.step + self.token * sum(chunk.length for chunk in action.chunks) + self.row * rows

    def prefill(self, arrivals: Sequence[Arrival]) -> float:
        """Return the seconds to prefill all prompts in full steps."""
        tokens = sum(arrival.prompt_len for arrival in arrivals)
        return tokens * (self.token + self.step / self.chunk)


class Figures(NamedTuple):
    """Percentiles of the time to first token, in seconds."""

    p50: float
    p99: float


def read_trace(path: str, limit: int | None = None) -> list[Arrival]:
    """Read a trace; times count from its first request.

    Raises:
        ValueError: it has fewer than two requests, or lacks one of the columns.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:limit]
    if len(rows) < 2 or not {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= rows[0].keys():
        raise ValueError(f"{path} is no trace: give a CSV with TIMESTAMP, ContextTokens, GeneratedTokens and two rows.")
    arrivals = [_arrival(row, f"{path}, line {number}") for number, row in enumerate(rows, start=2)]
    return [replace(arrival, t=arrival.t - arrivals[0].t) for arrival in arrivals]


def _arrival(row: dict[str, str], where: str) -> Arrival:
    """Read one line of a trace, its time in seconds of the epoch."""
    try:
        t = datetime.fromisoformat(row["TIMESTAMP"])
        t = t.replace(tzinfo=t.tzinfo or UTC)  # not the machine's zone, whose days may have 23 hours
        return Arrival(t.timestamp(), int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
    except (ValueError, TypeError):
        raise ValueError(f"{where}: {row} is no request: give a time as in ISO 8601 and two whole numbers.") from None


def at_load(arrivals: Sequence[Arrival], load: float, times: StepTime, meshes: int = 1) -> list[Arrival]:
    """Stretch the arrivals' times so that prefilling them keeps `meshes` meshes busy for the share `load` of the time.

    Raises:
        ValueError: `load` is not above 0, or the last request arrives no later than the first.
    """
    if not load > 0:
        raise ValueError(f"load={load} is not usable: give a share of prefill capacity above 0, such as 0.8.")
    if not arrivals[-1].t > 0:
        raise ValueError("the trace's last request comes no later than its first: time cannot be stretched to a load.")
    factor = times.prefill(arrivals) / meshes / load / arrivals[-1].t
    return [replace(arrival, t=arrival.t * factor) for arrival in arrivals]


def simulate(arrivals: Sequence[Arrival], policy: Policy, times: StepTime, topology: str) -> list[float]:
    """Run all requests to their end and return their times to first token, in seconds, in order of arrival."""
    longest = max(arrival.prompt_len + arrival.max_tokens for arrival in arrivals)
    config = EngineConfig(
        Topology.parse(topology),
        max_model_len=longest,
        max_num_seqs=_SLOTS,
        prefill_buckets=(times.chunk,),
        decode_buckets=(_SLOTS,),
        prefix_cache=False,
    )
    pool = PoolSize((max(_PAGES, config.max_pages),), (1,), staging_bytes=8 * config.max_pages)
    run = _Run(Scheduler(config, [pool] * len(config.topology.meshes), policy), times)
    for number, arrival in enumerate(arrivals):
        run.post(arrival.t, Arrived(arrival.t, RequestFacts(number, arrival.prompt_len, arrival.max_tokens)))
    return run.to_the_end()


class _Run:
    """A simulated run: events in the order of their times, and meshes that do one step at a time each."""

    def __init__(self, scheduler: Scheduler, times: StepTime):
        self._scheduler, self._times = scheduler, times
        self._free = [0.0] * len(scheduler.meshes)
        self._events: list[tuple[float, int, Event | Prefill | Decode | Fused]] = []
        self._ttft: dict[int, float] = {}
        self._arrival: dict[int, float] = {}
        self._count = 0

    def post(self, t: float, event: Event | Prefill | Decode | Fused) -> None:
        """Add something that happens at a time; a step stands for its result."""
        self._count += 1
        heapq.heappush(self._events, (t, self._count, event))

    def to_the_end(self) -> list[float]:
        """Run until nothing is left to happen, and return the times to first token in order of arrival."""
        while self._events:
            t, _, event = heapq.heappop(self._events)
            self._scheduler.on(self._outcome(t, event))
            for action in self._scheduler.actions():
                if isinstance(action, Prefill | Decode | Fused):
                    self._free[action.mesh] = max(t, self._free[action.mesh]) + self._times.seconds(action)
                    self.post(self._free[action.mesh], action)
                elif isinstance(action, StartTransfer):
                    # The gather is in the source's order, and the KV has arrived when that has come so far.
                    at = max(t, self._free[action.source])
                    self.post(at, TransferReady(at, action.transfer))
        return [self._ttft[number] for number in sorted(self._ttft)]

    def _outcome(self, t: float, event: Event | Prefill | Decode | Fused) -> Event:
        if isinstance(event, Arrived):
            self._arrival[event.facts.id] = t
        if not isinstance(event, Prefill | Decode | Fused):
            return event
        outcomes = []
        for row, tokens in _rows(event):
            request = self._scheduler.owner(row)
            if request is None:
                continue
            outcomes += [Outcome(row.request_id, False)] * min(tokens, request.max_tokens - request.confirmed)
            self._ttft.setdefault(row.request_id, t - self._arrival[row.request_id])
        return StepDone(t, event.mesh, event.step, tuple(outcomes))


def _rows(action: Prefill | Decode | Fused) -> Iterator[tuple[Chunk | DecodeRow, int]]:
    """Yield the rows that sample, and how many tokens each samples."""
    if not isinstance(action, Decode):
        yield from ((chunk, 1) for chunk in action.chunks if chunk.is_last)
    if not isinstance(action, Prefill):
        yield from ((row, action.steps if isinstance(action, Decode) else 1) for row in action.rows)


def compare(arrivals: Sequence[Arrival], names: Sequence[str], times: StepTime, topology: str) -> dict[str, Figures]:
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
        arrivals = at_load(read_trace(args.trace, args.requests), args.load, times, meshes)
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
    parser.add_argument("--trace", required=True, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
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
