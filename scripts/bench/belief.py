"""Is the simulation to be believed? The real engine against it, on this machine, load by load.

    python scripts/bench/belief.py --json belief.json
    python scripts/bench/belief.py --requests 40 --runs 1 --only "chat 0.3" --json few.json      # in some minutes
    python scripts/bench/belief.py --against earlier.json --json belief.json                     # a gate

For each engine (a topology) a process starts, measures its own profile, and waits. The rate of each mix of lengths and
load is that share of what the slowest topology sustains by the simulation, the same for all of them; requests come at
random (Poisson, open loop), in every run at the same times. Then all points are run in turn, `--runs` times, and
simulated from the profile, which knows nothing of these loads: it was fitted to steps that `twinmesh profile` measures.
One engine is a pool whose roles are called for anew in the middle of the load, twice.

Reported for each point: TTFT, TPOT, E2E and tokens per second as predicted and as measured (the median over the runs),
their error and the real engine's own spread, and where the time goes; over all points: mean and worst errors, coverage,
and the regret of choosing the topology by simulation (`belief_report.py`). `--noise` is that of the simulations whose
range coverage speaks of. With `--add` points are added to those in `--json`, so that the benchmark can be made in
parts, each of which measures its profiles anew; rates stay those of the first part.

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
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.simulation.incidents import RolesCalled
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.scripts.bench import belief_report as report
from twinmesh.scripts.bench.belief_points import Engine, Mix, Point, arrivals, at_once, flips, points
from twinmesh.scripts.bench.belief_run import Load, Outcome, Ran, Served, serve

ENGINES = ("both=1", "both=2", "prefill=1,decode=1", "pool=2:both=2:prefill=1,decode=1:both=2")
MIXES = ("chat=16-64/8-24", "prompts=64-192/2-8")
LOADS = (0.3, 0.6)
_LATENCIES = ("ttft", "tpot", "e2e")
_PARTS = ("queue", "prefill", "handoff", "decode", "host")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, print a table and what it comes to, and return the exit code."""
    args = _arguments(argv)
    earlier = json.loads(Path(args.against).read_text())["points"] if args.against else []
    before = _added(args)
    wanted = [
        point for point in points(args.engines, args.mixes, args.loads) if any(text in point.name for text in args.only)
    ]
    if not wanted:
        raise SystemExit(f"belief: no point has {' or '.join(args.only)} in its name: leave --only out to see them.")
    with ExitStack() as stack:
        engines = {point.engine: point.engine for point in wanted}
        links = {engine: stack.enter_context(Link(engine, args)) for engine in engines}
        rates = before["rates"] | {
            key: rate for key, rate in _rates(links, wanted, args).items() if key not in before["rates"]
        }
        found = [_measured(links, point, rates[_key(point)], args) for point in [] or wanted]
    rows = [point for point in before["points"] if point["name"] not in {row["name"] for row in found}] + found
    summed = report.summarise(rows)
    print(report.table(found), report.summary(summed), sep="\n")
    grown = report.grown(rows, earlier)
    print(*grown, sep="\n", end="\n" * bool(grown))
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        result = {"args": _compared(args), "rates": rates, "points": rows, "summary": summed, "grown": grown}
        Path(args.json).write_text(json.dumps(about | result, indent=1))
    return 1 if grown else 0
