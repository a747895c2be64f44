"""The planner against every static split and against meshes that do both, on simulated devices.

    python scripts/bench/planner.py --conversations AzureLLMInferenceTrace_conv_2023.csv \\
        --mooncake mooncake_conversation_trace.jsonl --json planner.json

For each model (`--models`), number of GPUs (`--gpus`), load and true speed: goodput, as requests that met the SLO per
second of arrivals, of

- the planner: `pool=N` with the SLO's percentile, which begins with all meshes doing both;
- static: every `prefill=i,decode=N-i`; with more than 16 meshes those found by halving the step around the best,
  from a grid of an eighth;
- colocation: `both=N` and `both(mode=fused)=N`, each with chunks of `--chunks` tokens (all others have `--chunk`);
- oracle: it knows the load. Search space: for each of the load's phases the static split that met most of the requests
  that came in it, called for by `set_roles` 0 or 10 s before the phase begins, and all meshes doing both.

The hindsight split is the best static one of the whole load. Loads are shares of what the meshes can do
(`planner_loads.py`): the first requests of both traces in their own times, stretched (steady); a spike of 10 times the
requests; a day whose mix goes from writing to reading and back. Step times are `--speeds` times what the profile says,
with `--noise` (standard deviation of the logarithm) which nobody sees; devices alone, the host takes no time.

Recovery is from the end of the spike until 95 % of those that come in the next 10 s meet the SLO. Aims: steady, at
least 0.97 of the hindsight split; day, at least 1.3 of it; recovery at most twice the oracle's.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.simulation.incidents import RolesCalled
from twinmesh.engine.simulation.simulator import SimulatedEngine, Simulation, simulate
from twinmesh.engine.simulation.workload import Workload
from twinmesh.scripts.bench import planner_loads as loads
from twinmesh.scripts.bench.planner_loads import Load
from twinmesh.scripts.bench.simulation import engine_of

MODELS = {"llama-3.1-8b": 1, "llama-3.1-70b": 4}  # name -> tp
SLOS = {"llama-3.1-8b": SLO(ttft_ms=2000, tpot_ms=30), "llama-3.1-70b": SLO(ttft_ms=4000, tpot_ms=60)}
_PERCENTILE = 90.0
_ALL = 16  # meshes up to which every split is tried
_WINDOW, _ENOUGH = 10.0, 0.95  # seconds and share, of a recovery


class Outcome(NamedTuple):
    """What became of a load: by request, when it came and whether it met the SLO."""

    arrival: np.ndarray  # [requests] seconds
    met: np.ndarray  # [requests] bool

    @property
    def goodput(self) -> float:
        """Return the requests that met the SLO per second of arrivals."""
        return float(self.met.sum() / self.arrival.max())

    def share(self, begin: float = 0.0, end: float = np.inf) -> float:
        """Return the share of those that came in this time that met it; 0 where none came."""
        here = (self.arrival >= begin) & (self.arrival < end)
        return float(self.met[here].mean()) if here.any() else 0.0

    def recovery(self, end: float) -> float | None:
        """Return the seconds from `end` until enough of those that come next meet it; None: they never do."""
        for begin in self.arrival[self.arrival >= end]:
            if begin + _WINDOW > self.arrival.max():
                break
            if self.share(begin, begin + _WINDOW) >= _ENOUGH:
                return float(begin - end)
        return None


class Bench:
    """Runs of one model on so many meshes, at one true speed."""

    def __init__(self, model: str, meshes: int, load: Load, speed: float, args: argparse.Namespace) -> None:
        """Run nothing yet."""
        self.model, self.meshes, self.load, self.speed, self.args = model, meshes, load, speed, args
        self.slo = SLOS[model]
        self._known: dict[str, Outcome] = {}

    def run(self, topology: str, *, calls: Sequence[RolesCalled] = (), **options: Any) -> Outcome:
        """Simulate the load on a topology."""
        key = repr((topology, calls, options))
        if key not in self._known:
            engine = engine_of(topology, self.args.device, self.model, **options)
            self._known[key] = self._judged(self._simulated(engine, calls))
        return self._known[key]

    def _simulated(self, engine: SimulatedEngine, calls: Sequence[RolesCalled]) -> Simulation:
        workload = Workload(self.load.name, self.load.requests)
        return simulate(workload, engine, incidents=calls, speed=self.speed, noise=self.args.noise, seed=1)

    def _judged(self, done: Simulation) -> Outcome:
        column = done.records.column
        arrival, first, output = column("arrival"), column("first_token"), column("output_len")
        gaps = (column("last_token") - first) / np.maximum(1, output - 1)
        assert self.slo.ttft_ms is not None
        assert self.slo.tpot_ms is not None
        met = (1e3 * (first - arrival) <= self.slo.ttft_ms) & (1e3 * gaps <= self.slo.tpot_ms)
        order = np.argsort(arrival, kind="stable")
        return Outcome(arrival[order], met[order])

    # ---- who takes part

    def _run_pool(self, **options: Any) -> Outcome:
        topology = f"pool={self.meshes}xtp{MODELS[self.model]}"
        return self.run(topology, prefill_buckets=buckets(self.args.chunk), **options)

    def static(self, prefills: int) -> Outcome:
        """Run a static split."""
        tp = MODELS[self.model]
        topology = f"prefill={prefills}xtp{tp},decode={self.meshes - prefills}xtp{tp}"
        return self.run(topology, prefill_buckets=buckets(self.args.chunk))

    def splits(self) -> dict[int, Outcome]:
        """Run the static splits, by prefill meshes."""
        if self.meshes <= _ALL:
            return {prefills: self.static(prefills) for prefills in range(1, self.meshes)}
        step = self.meshes // 8
        found = {prefills: self.static(prefills) for prefills in range(step, self.meshes, step)}
        while step > 1:
            step //= 2
            best = max(found, key=lambda prefills: found[prefills].goodput)
            for prefills in (best - step, best + step):
                if 0 < prefills < self.meshes:
                    found[prefills] = self.static(prefills)
        return found

    def colocated(self) -> dict[str, Outcome]:
        """Run meshes that do both, by mode and chunk size."""
        tp, found = MODELS[self.model], {}
        for mode in ("", "(mode=fused)"):
            for chunk in self.args.chunks:
                topology = f"both{mode}={self.meshes}xtp{tp}"
                found[f"both{mode} chunk {chunk}"] = self.run(topology, prefill_buckets=buckets(chunk))
        return found

    def planner(self) -> Outcome:
        """Run a pool that plans its roles."""
        return self._run_pool(slo=replace_percentile(self.slo))

    def oracle(self, splits: dict[int, Outcome]) -> Outcome:
        """Run a pool whose roles are called for by one who knows the load."""
        best = [
            max(splits, key=lambda prefills: splits[prefills].share(phase.begin, phase.end))
            for phase in self.load.phases
        ]
        text = [f"prefill={prefills},decode={self.meshes - prefills}" for prefills in best]
        tried = [self._run_pool()]
        for lead in (0.0, 10.0):
            calls = [
                RolesCalled(max(0.0, phase.begin - lead), roles, 60.0)
                for phase, roles, before in zip(self.load.phases[1:], text[1:], text, strict=False)
                if roles != before
            ]
            tried.append(self._run_pool(calls=tuple(calls), roles=text[0]))
        return max(tried, key=lambda outcome: outcome.goodput)


def buckets(chunk: int) -> tuple[int, ...]:
    """Return the sizes of prefill steps whose chunks have at most so many tokens."""
    return (*(size for size in (64, 256, 512) if size < chunk), chunk)


def replace_percentile(slo: SLO) -> SLO:
    """Return an SLO that has a percentile, by which a pool plans."""
    return SLO(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, percentile=_PERCENTILE)


def _row(bench: Bench) -> dict[str, Any]:
    """Run all on one load, and compare."""
    begin = time.perf_counter()
    splits, planner = bench.splits(), bench.planner()
    both = bench.colocated()
    oracle = bench.oracle(splits)
    best = max(splits, key=lambda prefills: splits[prefills].goodput)
    best_both = max(both, key=lambda name: both[name].goodput)
    row: dict[str, Any] = {
        "model": bench.model, "meshes": bench.meshes, "load": bench.load.name, "speed": bench.speed,
        "requests": len(bench.load.requests), "seconds": bench.load.requests[-1].time,
        "splits": {prefills: found.goodput for prefills, found in sorted(splits.items())},
        "both": {name: found.goodput for name, found in both.items()},
        "planner": planner.goodput, "oracle": oracle.goodput, "met_by_planner": planner.share(),
        "best_split": f"{best}P{bench.meshes - best}D", "best_both": best_both,
        "to_split": planner.goodput / max(1e-9, splits[best].goodput),
        "to_both": planner.goodput / max(1e-9, both[best_both].goodput),
        "to_oracle": planner.goodput / max(1e-9, oracle.goodput),
    }  # fmt: skip
    if bench.load.name == "spike":
        end = bench.load.phases[1].end
        row["recovery"] = {"planner": planner.recovery(end), "oracle": oracle.recovery(end)}
        row["recovery"]["split"] = splits[best].recovery(end)
    return row | {"wall": time.perf_counter() - begin}


def _loads(model: str, meshes: int, args: argparse.Namespace) -> Iterator[Load]:
    costs = engine_of(f"both={meshes}xtp{MODELS[model]}", args.device, model).costs_of_meshes[0]
    make: dict[str, Callable[[], Load]] = {
        "day": lambda: loads.day(costs, meshes, args.share, args.day),
        "spike": lambda: loads.spike(costs, meshes, args.share / 2, args.spike),
        "conversations": lambda: loads.steady(
            args.conversations, "conversations", costs, meshes, args.share, args.requests
        ),
        "mooncake": lambda: loads.steady(args.mooncake, "mooncake", costs, meshes, args.share, args.requests),
    }
    for name in args.loads:
        if name in ("conversations", "mooncake") and getattr(args, name) is None:
            print(f"{name}: no trace is given, and it is left out", flush=True)
        else:
            yield make[name]()


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print a line for each load, and return the exit code."""
    args = _arguments(argv)
    rows = []
    for model in args.models:
        for gpus in args.gpus:
            meshes = gpus // MODELS[model]
            for load in _loads(model, meshes, args):
                for speed in args.speeds:
                    rows.append(_row(Bench(model, meshes, load, speed, args)))
                    print(_line(rows[-1]), flush=True)
                    if args.json is not None:
                        about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform()}
                        about |= {"cores": os.cpu_count(), "args": vars(args), "rows": rows}
                        Path(args.json).write_text(json.dumps(about, indent=1))
    return 0


def _line(row: dict[str, Any]) -> str:
    text = (
        "{model} {meshes} meshes {load} x{speed}: {requests} requests in {seconds:.0f} s; planner {planner:.2f}/s "
        "({met_by_planner:.0%}), {to_split:.2f} of {best_split}, {to_both:.2f} of {best_both}, {to_oracle:.2f} of the "
        "oracle"
    ).format(**row)
    if "recovery" in row:
        text += "; recovery " + ", ".join(
            f"{who} {'never' if seconds is None else f'{seconds:.0f} s'}" for who, seconds in row["recovery"].items()
        )
    return f"{text} [{row['wall']:.0f} s]"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--conversations", metavar="FILE", help="a trace of conversations (none)")
    parser.add_argument("--mooncake", metavar="FILE", help="a Mooncake trace (none)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64], help="default: 8 64")
    parser.add_argument(
        "--loads", nargs="+", choices=("conversations", "mooncake", "spike", "day"), metavar="LOAD",
        default=["conversations", "mooncake", "spike", "day"], help="conversations, mooncake, spike, day (all)",
    )  # fmt: skip
    parser.add_argument("--speeds", nargs="+", type=float, default=[0.8, 1.0, 1.25], help="default: 0.8 1 1.25")
    parser.add_argument("--noise", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--share", type=float, default=0.6, help="of what meshes can do (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3000, help="of a steady load (default: %(default)s)")
    parser.add_argument("--day", metavar="S", type=float, default=500.0, help="seconds of a day (%(default)s)")
    parser.add_argument("--spike", metavar="S", type=float, default=200.0, help="seconds with a spike (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens, of pools and splits (default: %(default)s)")
    parser.add_argument("--chunks", nargs="+", type=int, default=[512, 2048], help="of colocation (default: 512 2048)")
    parser.add_argument("--device", default="h100", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
