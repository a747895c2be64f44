"""Is `twinmesh whatif` to be believed? Real runs, what their logs say of another topology, and real runs of that.

    python scripts/bench/whatif.py --json whatif.json
    python scripts/bench/whatif.py --requests 40 --runs 1 --json few.json        # in some minutes

The same requests come at the same times to an engine of each topology, `--runs` times by turns, each in a process of
its own that writes a decision log. From each log of one topology the run is simulated under the other, by the library
behind `twinmesh whatif`, and held against the real runs of that other: TTFT, TPOT and E2E at P50, P90 and P99, and
tokens per second. Reported besides: what the simulation of the run as it was gets wrong, whether the better topology is
named by each figure, and by how much the parts of `twinmesh explain` miss a request's TTFT, over all requests.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from twinmesh.engine.metrics.load_report import LoadReport
from twinmesh.engine.metrics.request_records import RequestRecord
from twinmesh.engine.simulation.logs.explain import explain
from twinmesh.engine.simulation.logs.logged_run import read_run
from twinmesh.engine.simulation.logs.whatif import Otherwise, what_if
from twinmesh.scripts.bench import belief_report as report
from twinmesh.scripts.bench.belief import buckets, engine_options, figures
from twinmesh.scripts.bench.belief_points import Engine, Mix, arrivals
from twinmesh.scripts.bench.belief_run import Load, run

TOPOLOGIES = ("both=2", "prefill=1,decode=1")
MIX = "mixed=16-96/4-24"
EXPLAINED = 0.001  # seconds by which the parts of a TTFT may miss it


class Logged(NamedTuple):
    """What one real run gave, and what its log says."""

    records: list[RequestRecord]
    again: dict[str, float]  # figures of the run as it was, simulated
    otherwise: dict[str, float]  # under the other topology
    missed: float  # seconds by which the parts of a TTFT miss it at most
    notes: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, print a table and return the exit code: 1 if parts miss a TTFT by more than a millisecond."""
    args = _arguments(argv)
    load = Load(arrivals(args.mixes[0], args.rate, args.requests, args.seed), ())
    runs: dict[str, list[Logged]] = {topology: [] for topology in args.topologies}
    for turn in range(args.runs):
        for topology, other in zip(args.topologies, reversed(args.topologies), strict=True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                runs[topology].append(pool.submit(logged, topology, other, load, args).result())
            print(f"run {turn + 1} of {topology} done", file=sys.stderr, flush=True)
    rows = [row(topology, runs) for topology in args.topologies]
    named = better(runs)
    missed = max(one.missed for listed in runs.values() for one in listed)
    print(*map(_text, rows), _named(named), sep="\n")
    print(f"explain: parts miss a time to first token by {1e3 * missed:.3f} ms at most (limit {1e3 * EXPLAINED:g})")
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.platform(), "cores": os.cpu_count()}
        result = {"args": {name: str(value) for name, value in vars(args).items()}, "rows": rows, "better": named}
        Path(args.json).write_text(json.dumps(about | result | {"explain_missed_seconds": missed}, indent=1))
    return int(missed > EXPLAINED)


def logged(topology: str, other: str, load: Load, args: argparse.Namespace) -> Logged:
    """Run a load on a real engine that writes a decision log, and ask the log. Call it in a fresh process."""
    from twinmesh import LLM

    with TemporaryDirectory() as folder:
        log = str(Path(folder) / "run.log")
        with LLM(args.model, decision_log=log, **engine_options(Engine(topology), args)) as llm:
            records, _ = run(llm, load)
        return ask(log, records, other)


def ask(log: str, records: list[RequestRecord], other: str) -> Logged:
    """Let a run's log say what it was, what another topology would have been, and why first tokens were late."""
    told = read_run(log)
    found = what_if(told, Otherwise(topology=other))
    assert found.otherwise is not None
    by_number = sorted(told.requests)  # ids are given in the order of arrival
    missed = 0.0
    for record, explained in zip(records, explain(told, log, by_number), strict=True):
        missed = max(missed, abs(sum(explained.parts.values()) - (record.ttft or 0.0)))
    return Logged(records, _figures(found.again), _figures(found.otherwise), missed, found.notes)


def _figures(summed: LoadReport) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, row in (("ttft", summed.ttft), ("tpot", summed.tpot), ("e2e", summed.e2e)):
        assert row is not None
        found |= {f"{name} {percentile}": float(getattr(row, percentile)) for percentile in ("p50", "p90", "p99")}
    return found | {"tokens/s": summed.output_tokens_per_second}


def row(topology: str, runs: Mapping[str, Sequence[Logged]]) -> dict[str, Any]:
    """Hold what a topology's logs say of the other one against real runs of that, and of itself against itself."""
    (other,) = (name for name in runs if name != topology)
    measured = {name: [figures(one.records) for one in listed] for name, listed in runs.items()}
    own, theirs = ({f: median(getattr(one, kind)[f] for one in runs[topology]) for f in measured[other][0]}
                   for kind in ("again", "otherwise"))  # fmt: skip
    return {
        "log_of": topology,
        "asked_of": other,
        "figures": report.compare(theirs, measured[other]),
        "as_it_was": report.compare(own, measured[topology]),
        "notes": runs[topology][0].notes,
    }


def better(runs: Mapping[str, Sequence[Logged]]) -> list[dict[str, Any]]:
    """Say by each figure which topology was better, and which each topology's logs name."""
    first, second = runs
    measured = {name: [figures(one.records) for one in listed] for name, listed in runs.items()}
    found = []
    for criterion in report.CRITERIA:
        real = {name: median(run[criterion] for run in measured[name]) for name in runs}
        named = {}
        for topology, listed in runs.items():
            other = second if topology == first else first
            own = median(one.again[criterion] for one in listed)
            named[topology] = other if median(one.otherwise[criterion] for one in listed) < own else topology
        best = min(real, key=lambda name: real[name])
        found.append(
            {"criterion": criterion, "measured": real, "better": best, "named_by": named,
             "apart": max(real.values()) / min(real.values()) - 1}
        )  # fmt: skip
    return found


def _text(found: Mapping[str, Any]) -> str:
    lines = [f"from the log of {found['log_of']}, {found['asked_of']} would have been:"]
    for name, one in found["figures"].items():
        scale, unit = (1.0, "tokens/s") if name == "tokens/s" else (1e3, "ms")
        verdict = "" if abs(one["error"]) <= report.aim_of(name) else "  missed"
        lines.append(
            f"  {name:10} predicted {scale * one['predicted']:9.1f}  measured {scale * one['measured']:9.1f} {unit:8}  "
            f"error {one['error']:+7.1%}  spread {one['spread']:6.1%}  "
            f"as it was {found['as_it_was'][name]['error']:+7.1%}{verdict}"
        )
    return "\n".join(lines + [f"  note: {note}" for note in found["notes"]])


def _named(found: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"better by {one['criterion']}: {one['better']} by {one['apart']:.0%}; named by the log of "
        + ", ".join(f"{topology}: {name}" for topology, name in one["named_by"].items())
        for one in found
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--topologies", nargs=2, default=list(TOPOLOGIES), metavar="TOPOLOGY")
    parser.add_argument("--mix", type=Mix.parse, default=Mix.parse(MIX), metavar="NAME=LOW-HIGH/LOW-HIGH",
                        help=f"tokens of prompts and answers (default: {MIX})")  # fmt: skip
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second (default: 2)")
    parser.add_argument("--requests", type=int, default=300, help="of a run (default: 300)")
    parser.add_argument("--runs", type=int, default=3, help="of each topology (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--prefill-buckets", type=buckets, default=(16, 64), metavar="N,...")
    parser.add_argument("--decode-buckets", type=buckets, default=(1, 4, 8), metavar="N,...")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    args = parser.parse_args(argv)
    args.mixes = [args.mix]
    return args


if __name__ == "__main__":
    sys.exit(main())
