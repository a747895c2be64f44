"""Is the simulation to be believed? The real engine against it, on this machine, load by load.

    python scripts/bench/belief.py --json belief.json
    python scripts/bench/belief.py --requests 40 --runs 1 --only "chat 0.3" --json few.json      # in some minutes
    python scripts/bench/belief.py --against earlier.json --json belief.json                     # a gate

For each engine (a topology) a process starts, measures its own profile, and waits. The rate of each mix of lengths and
load is that share of what the slowest topology sustains by the simulation, the same for all of them; requests come at
random (Poisson, open loop), in every run at the same times. Then all points are run in turn, `--runs` times, and
simulated from the profile, which knows nothing of these loads: it was fitted to steps that `twinmesh profile` measures.
The loads of the profile are measured once more before each turn, so that a machine whose speed drifts is profiled at
the speed that it has. One engine is a pool whose roles are called for anew in the middle of the load, twice.

Reported for each point: TTFT, TPOT, E2E and tokens per second as predicted and as measured (the median over the runs),
their error and the real engine's own spread, and where the time goes; over all points: mean and worst errors, coverage,
and the regret of choosing the topology by simulation (`belief_report.py`). What is predicted is the median over
`--seeds` simulations whose step times spread as those of the profile did; coverage speaks of their range. With `--add`
points are added to those in `--json`, so that the benchmark can be made in parts, each of which measures its profiles
anew; rates stay those of the first part.

With `--against` the exit code is 1 if an error has grown by both 2 points and 10 %, or a point has disappeared.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from twinmesh.engine.metrics.request_records import RequestRecord
from twinmesh.engine.simulation.incidents import RolesCalled
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.scripts.bench import belief_report as report
from twinmesh.scripts.bench.belief_points import Engine, Mix, Point, arrivals, at_once, flips, points
from twinmesh.scripts.bench.belief_run import PROFILE, Load, Outcome, Served, serve
from twinmesh.scripts.bench.belief_steps import step_ratios

ENGINES = ("both=1", "both=2", "prefill=1,decode=1", "pool=2:both=2:prefill=1,decode=1:both=2")
MIXES = ("chat=4-16/2-8", "prompts=32-96/4-8")
LOADS = (0.5, 0.8)
KV_BYTES = 1 << 28  # of each mesh: two engines a process share the machine's memory with those of other processes
_LATENCIES = ("ttft", "tpot", "e2e")
_PARTS = ("queue", "prefill", "handoff", "decode", "host")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, print a table and what it comes to, and return the exit code."""
    args = _arguments(argv)
    earlier = json.loads(Path(args.against).read_text())["points"] if args.against else []
    kept = _kept(args)
    wanted = _wanted(args)
    with ExitStack() as stack:
        links = {
            engine: stack.enter_context(Link(engine, args))
            for engine in dict.fromkeys(point.engine for point in wanted)
        }
        rates = _rates(links, wanted, args) | kept["rates"] | _given(wanted, args)
        found = measure(links, wanted, rates, args)
    rows = [row for row in kept["points"] if row["name"] not in {new["name"] for new in found}] + found
    summed, grown = report.summarise(rows), report.grown(rows, earlier)
    print(report.table(found), report.summary(summed), *grown, sep="\n")
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.platform(), "cores": os.cpu_count()}
        result = {"args": _compared(args), "rates": rates, "points": rows, "summary": summed, "grown": grown}
        Path(args.json).write_text(json.dumps(about | result, indent=1))
    return 1 if grown else 0


class Link:
    """An engine in a process of its own, and what it told of itself."""

    def __init__(self, engine: Engine, args: argparse.Namespace) -> None:
        """Start the process; its profile is measured when the `with` block begins."""
        self.engine = engine
        context = get_context("spawn")
        self._here, self._there = context.Pipe()
        arguments = (self._there, args.model, engine_options(engine, args), args.quick)
        self._process = context.Process(target=serve, args=arguments, daemon=True)

    def __enter__(self) -> "Link":
        """Wait until the engine has its profile."""
        self._process.start()
        self._there.close()  # so that the process alone holds that end, and its own end is seen
        self.profile()
        return self

    def profile(self) -> None:
        """Measure the profile once more, and go by all measurements so far."""
        self._here.send(PROFILE)
        self.served: Served = self._receive()
        errors = ", ".join(f"{e.kind} {e.mape:.1%} at most {e.worst:.1%} of {e.points}" for e in self.served.errors)
        spread = f"steps spread by {self.served.spread:.1%}"
        print(f"{self.engine.name}: errors of the profile: {errors}; {spread}", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        """End the process."""
        if self._process.is_alive():
            self._here.send(None)
            self._process.join()

    def run(self, load: Load) -> Outcome:
        """Run a load on the real engine."""
        self._here.send(load)
        outcome: Outcome = self._receive()
        return outcome

    def simulate(self, load: Load, seed: int = 0) -> list[RequestRecord]:
        """Run it on the simulated one."""
        served = self.served
        calls = [RolesCalled(at, roles) for at, roles in load.calls]
        simulated = SimulatedEngine(served.config, served.pools, served.costs)
        return list(simulate(load.workload, simulated, incidents=calls, noise=served.spread, seed=seed).records)

    def _receive(self) -> Any:
        try:
            return self._here.recv()
        except EOFError:
            raise SystemExit(f"belief: the engine {self.engine.name} has ended; above is why.") from None


def engine_options(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a real engine that all these loads fit into."""
    longest = max(mix.longest for mix in args.mixes)
    options = {"topology": engine.topology, "max_model_len": longest, "max_num_seqs": args.max_num_seqs}
    options |= {"prefill_buckets": args.prefill_buckets, "decode_buckets": args.decode_buckets, "dtype": args.dtype}
    options["kv_cache_bytes"] = KV_BYTES
    return options | ({"roles": engine.roles[0]} if engine.roles else {})


def measure(
    links: Mapping[Engine, Link], wanted: Sequence[Point], rates: Mapping[str, float], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run all points by turns, as often as asked for, and hold them against their simulations."""
    loads = {point: load_of(point, rates[_key(point)], args) for point in wanted}
    outcomes: dict[Point, list[Outcome]] = {point: [] for point in wanted}
    for turn in range(args.runs):
        for link in links.values() if turn else ():  # before the first each has its profile
            link.profile()
        for point, load in loads.items():
            begin = time.perf_counter()
            outcomes[point].append(links[point.engine].run(load))
            seconds = time.perf_counter() - begin
            print(f"{point.name}, run {turn + 1}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return [row(links[point.engine], point, loads[point], outcomes[point], args) for point in wanted]


def load_of(point: Point, rate: float, args: argparse.Namespace) -> Load:
    """Make a point's load."""
    workload = arrivals(point.mix, rate, args.requests, args.seed)
    return Load(workload, tuple(flips(point.engine, args.requests / rate)))


def row(link: Link, point: Point, load: Load, outcomes: Sequence[Outcome], args: argparse.Namespace) -> dict[str, Any]:
    """Hold one point's runs against its simulation."""
    simulated = [link.simulate(load, seed) for seed in range(args.seeds)]
    noisy = [figures(records) for records in simulated]
    predicted = {name: median(one[name] for one in noisy) for name in noisy[0]}
    runs = [figures(outcome.records) for outcome in outcomes]
    parts, seen = mean_parts(simulated[0]), [mean_parts(outcome.records) for outcome in outcomes]
    return {
        "name": point.name,
        "engine": point.engine.name,
        "mix": point.mix.name,
        "load": point.load,
        "flips": len(load.calls),
        "requests": len(outcomes[0].records),
        "rate": (len(outcomes[0].records) - 1) / arrival_seconds(load),
        "figures": report.compare(predicted, runs),
        "range": {name: (min(run[name] for run in noisy), max(run[name] for run in noisy)) for name in runs[0]},
        "runs": runs,
        "parts": {name: {"predicted": parts[name], "measured": median(one[name] for one in seen)} for name in _PARTS},
        "steps": step_ratios(link.served.costs, [outcome.steps for outcome in outcomes]),
        "late": max(outcome.late for outcome in outcomes),
        "costs": msgspec.to_builtins(link.served.costs, str_keys=True),
    }


def arrival_seconds(load: Load) -> float:
    """Return the seconds from the first arrival to the last."""
    times = [work.time for work in load.workload.requests]
    return times[-1] - times[0]


def figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Sum up a run: percentiles of its latencies, in seconds, and generated tokens per second."""
    found = {}
    for name in _LATENCIES:
        values = [value for record in records if (value := getattr(record, name)) is not None]
        for percentile in (50, 90, 99):
            found[f"{name} p{percentile}"] = float(np.percentile(values, percentile))
    wall = max(record.finish or 0.0 for record in records) - min(record.arrival for record in records)
    return found | {"tokens/s": sum(record.output_len for record in records) / wall}


def mean_parts(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Return the mean seconds that requests spend in each part of their E2E."""
    decode = [(record.last_token or 0.0) - (record.first_token or 0.0) - record.handoff for record in records]
    found = {name: [getattr(record, name) for record in records] for name in _PARTS if name != "decode"}
    return {name: float(np.mean(values)) for name, values in (found | {"decode": decode}).items()}


def _rates(links: Mapping[Engine, Link], wanted: Sequence[Point], args: argparse.Namespace) -> dict[str, float]:
    """Return the requests per second of each mix and load: that share of what the slowest engine sustains, all at
    once, by its simulation."""
    rates: dict[str, float] = {}
    for mix in dict.fromkeys(point.mix for point in wanted):
        load = Load(at_once(mix, args.capacity, args.seed), ())
        slowest = min(args.capacity / _wall(link.simulate(load)) for link in links.values())
        rates |= {_key(point): point.load * slowest for point in wanted if point.mix == mix}
    return rates


def _given(wanted: Sequence[Point], args: argparse.Namespace) -> dict[str, float]:
    """Return the rates that follow from those that were given for load 1."""
    return {_key(point): point.load * args.rates[point.mix.name] for point in wanted if point.mix.name in args.rates}


def _wall(records: Sequence[RequestRecord]) -> float:
    return max(record.finish or 0.0 for record in records)


def _key(point: Point) -> str:
    return f"{point.mix.name} {point.load:g}"


def _wanted(args: argparse.Namespace) -> list[Point]:
    """Return the points whose names hold one of the texts of `--only`.

    Raises:
        SystemExit: there is none.
    """
    found = points(args.engines, args.mixes, args.loads)
    wanted = [point for point in found if not args.only or any(text in point.name for text in args.only)]
    if not wanted:
        names = "; ".join(point.name for point in found)
        raise SystemExit(f"belief: no point has {' or '.join(args.only)} in its name; they are {names}.")
    return wanted


def _kept(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates and points that `--add` adds to.

    Raises:
        SystemExit: they are of other arguments.
    """
    if not args.add or not Path(args.json).exists():
        return {"rates": {}, "points": []}
    kept: dict[str, Any] = json.loads(Path(args.json).read_text())
    if kept["args"] != _compared(args):
        raise SystemExit(f"{args.json} holds points of other arguments, {kept['args']}: give another file.")
    return kept


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that parts of one benchmark have in common."""
    same = ("model", "dtype", "requests", "runs", "seed", "max_num_seqs", "prefill_buckets", "decode_buckets")
    return {name: list(value) if isinstance(value := getattr(args, name), tuple) else value for name in same}


def _rate(text: str) -> tuple[str, float]:
    """Read MIX=RATE."""
    name, _, rate = text.partition("=")
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give requests per second of a mix, such as chat=2.5")
    return name, value


def buckets(text: str) -> tuple[int, ...]:
    """Read N,N,..."""
    return tuple(int(size) for size in text.split(","))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engines", type=Engine.parse, nargs="+", default=[Engine.parse(text) for text in ENGINES],
                        metavar="TOPOLOGY", help="a pool with the roles that it begins with and is called to: "
                        f"TOPOLOGY:ROLES:ROLES... (default: {' '.join(ENGINES)})")  # fmt: skip
    parser.add_argument("--mixes", type=Mix.parse, nargs="+", default=[Mix.parse(text) for text in MIXES],
                        metavar="NAME=LOW-HIGH/LOW-HIGH", help="tokens of prompts and answers "
                        f"(default: {' '.join(MIXES)})")  # fmt: skip
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), metavar="SHARE",
                        help=f"of what the slowest engine sustains (default: {' '.join(map(str, LOADS))})")  # fmt: skip
    parser.add_argument("--rates", type=_rate, nargs="+", default=[], metavar="MIX=RATE",
                        help="requests per second that stand for load 1 (default: as measured)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="points with one of these in their names")
    parser.add_argument("--requests", type=int, default=300, help="of a run of a point (default: 300)")
    parser.add_argument("--runs", type=int, default=3, help="of each point (default: 3)")
    parser.add_argument("--capacity", type=int, default=128, help="requests that rates are found with (default: 128)")
    parser.add_argument("--quick", action="store_true", help="a rough profile, in seconds")
    parser.add_argument("--seeds", type=int, default=10, help="simulations of each point (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--prefill-buckets", type=buckets, default=(16, 64), metavar="N,...")
    parser.add_argument("--decode-buckets", type=buckets, default=(1, 4, 8), metavar="N,...")
    parser.add_argument("--against", metavar="FILE", help="earlier results, which these may not fall behind")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--add", action="store_true", help="add to the points that are in --json")
    args = parser.parse_args(argv)
    args.rates = dict(args.rates)
    if args.add and not args.json:
        parser.error("--add needs --json FILE")
    return args


if __name__ == "__main__":
    sys.exit(main())
