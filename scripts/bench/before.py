"""Speed of this checkout beside an earlier one: decoding, and the host's time per step, in alternating processes.

    git worktree add /tmp/before COMMIT
    python scripts/bench/before.py --before /tmp/before --json before.json

Each pair runs both checkouts one after the other, every other pair in reverse order, each with the benchmark scripts of
its own (`generate` and `host`), in this Python. A process decodes each batch `--rounds` times, of which the fastest
counts: what else happens on a machine only ever slows a round. A ratio is above 1 where this checkout is faster.
Reported are all ratios, their median and range, and a 90 % interval of the median by bootstrap.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
_RESAMPLES = 2000
type Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs, print a line for each figure and return the exit code."""
    args = _arguments(argv)
    checkouts = {"before": Path(args.before).resolve(), "after": HERE}
    if not (checkouts["before"] / "engine").is_dir():
        print(f"before: --before {args.before} is no checkout of Twinmesh: it has no engine/ folder.", file=sys.stderr)
        return 2
    pairs: list[dict[str, Figures]] = []
    for index in range(args.pairs):
        order = sorted(checkouts, reverse=index % 2 == 0)
        pairs.append({name: measure(checkouts[name], args) for name in order})
        print(f"pair {index + 1} of {args.pairs} done", file=sys.stderr)
    rows = summarise(pairs)
    for row in rows:
        low, high = row["interval_90"]
        print(f"{row['figure']:28} median ratio {row['median']:.3f}, 90 % interval {low:.3f} to {high:.3f}")
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "pairs": pairs}, indent=1))
    return 0


def measure(checkout: Path, args: argparse.Namespace) -> Figures:
    """Return a checkout's tokens per second by number of requests, and its dispatching thread's steps per ms."""
    requests = [str(count) for _ in range(args.rounds) for count in args.requests]
    generate = ["--model", args.model, "--topologies", "both=1", "--tokens", str(args.tokens), "--requests", *requests]
    host = ["--topology", "both=1", "--layers", "45", "--requests", "64"]
    rows = _run(checkout, "generate", generate)
    figures = {
        f"decode at {count} requests": max(row["tokens_per_second"] for row in rows if row["requests"] == count)
        for count in args.requests
    }
    (row,) = _run(checkout, "host", host)
    return figures | {"host steps per ms at 64 requests": 1 / row["host_ms_per_step"]}


def _run(checkout: Path, name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run a benchmark script of this checkout and return the rows that it reports."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "twinmesh").symlink_to(checkout)  # the checkout's folder may have any name
        report = Path(folder) / "report.json"
        command = [sys.executable, str(_script(checkout, name)), *arguments, "--json", str(report)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": folder}, check=True, stdout=subprocess.DEVNULL)
        rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    return rows


def _script(checkout: Path, name: str) -> Path:
    """Return a benchmark's path: in scripts/bench/ or, in checkouts older than that folder, scripts/bench_NAME.py."""
    new = checkout / "scripts" / "bench" / f"{name}.py"
    return new if new.exists() else checkout / "scripts" / f"bench_{name}.py"


def summarise(pairs: Sequence[dict[str, Figures]]) -> list[dict[str, Any]]:
    """Return a row for each figure: all ratios after/before, their median, range and the median's 90 % interval."""
    rows = []
    for figure in pairs[0]["after"]:
        ratios = [pair["after"][figure] / pair["before"][figure] for pair in pairs]
        rows.append(
            {
                "figure": figure,
                "median": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "interval_90": interval(ratios),
                "ratios": ratios,
            }
        )
    return rows


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 90 % interval of the ratios' median, by percentile bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[round(0.05 * (_RESAMPLES - 1))], medians[round(0.95 * (_RESAMPLES - 1))]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of processes (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="times that a process decodes each batch (default: 3)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="requests that decode at once")
    parser.add_argument("--tokens", type=int, default=32, help="generated by each request (default: 32)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
