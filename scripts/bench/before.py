"""Speed of this checkout beside an earlier one: decoding, and the host's time per step, in pairs of processes.

    git worktree add /tmp/before COMMIT
    python scripts/bench/before.py --before /tmp/before --json before.json

The two processes of a pair decode the same batches by turns (`decode.py` beside this file, on either checkout), each
`--rounds` times, and the fastest round counts: what else happens on a machine only ever slows one. Then each checkout's
own `host` benchmark runs. Every other pair goes in reverse order. A ratio is above 1 where this checkout is faster.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from twinmesh.scripts.bench.checkouts import environment_of

HERE = Path(__file__).resolve().parents[2]
_RESAMPLES = 2000
type Figures = dict[str, float]  # rates by what they are of
type Server = subprocess.Popen[str]  # runs `decode.py`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs and print a line for each figure; returns the exit code."""
    args = _arguments(argv)
    checkouts = {"before": Path(args.before).resolve(), "after": HERE}
    if not (checkouts["before"] / "engine").is_dir():
        print(f"before: --before {args.before} is no checkout of Twinmesh: it has no engine/ folder.", file=sys.stderr)
        return 2
    pairs: list[dict[str, Figures]] = []
    for index in range(args.pairs):
        pairs.append(measure({name: checkouts[name] for name in sorted(checkouts, reverse=index % 2 == 0)}, args))
        print(f"pair {index + 1} of {args.pairs} done", file=sys.stderr)
    rows = summarise(pairs)
    for row in rows:
        low, high = row["interval_90"]
        print(f"{row['figure']:32} median ratio {row['median']:.3f}, 90 % interval {low:.3f} to {high:.3f}")
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "pairs": pairs}, indent=1))
    return 0


def measure(checkouts: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Figures]:
    """Measure one pair: of each checkout, tokens per second by number of requests, and steps per ms of its host."""
    figures = decode_rates(checkouts, args)
    if args.host:
        for name, checkout in checkouts.items():
            figures[name]["host steps per ms at 64 requests"] = host_rate(checkout)
    return figures


def decode_rates(checkouts: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Figures]:
    """Start an engine of each checkout, and let them decode by turns."""
    seconds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in args.requests} for name in checkouts}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_server(checkout, args)) for name, checkout in checkouts.items()}
        for _ in range(1 + args.rounds):  # the first warms up
            for count in args.requests:
                for name, server in servers.items():
                    seconds[name][count].append(_ask(server, count))
    return {
        name: {f"decode at {count} requests": count * args.tokens / min(times[1:]) for count, times in by_count.items()}
        for name, by_count in seconds.items()
    }


@contextmanager
def _server(checkout: Path, args: argparse.Namespace) -> Iterator[Server]:
    """Start `decode.py` on a checkout, wait until it is ready, and end it afterwards."""
    script = Path(__file__).with_name("decode.py")
    command = [sys.executable, str(script), "--model", args.model, "--tokens", str(args.tokens)]
    with environment_of(checkout) as env:
        server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with server:
            _answer(server)
            yield server


def _ask(server: Server, count: int) -> float:
    assert server.stdin is not None
    print(count, file=server.stdin, flush=True)
    return float(_answer(server))


def _answer(server: Server) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise SystemExit("before: decode.py has ended; above is why.")
    return line


def host_rate(checkout: Path) -> float:
    """Return the steps per millisecond of a checkout's dispatching thread, by its own benchmark."""
    new = checkout / "scripts" / "bench" / "host.py"
    script = new if new.exists() else checkout / "scripts" / "bench_host.py"
    with environment_of(checkout) as env, tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--topology", "both=1", "--layers", "45", "--requests", "64", "--json", str(report)]
        subprocess.run([sys.executable, str(script), *options], env=env, check=True, stdout=subprocess.DEVNULL)
        (row,) = json.loads(report.read_text())["rows"]
    return 1 / float(row["host_ms_per_step"])


def summarise(pairs: Sequence[dict[str, Figures]]) -> list[dict[str, Any]]:
    """Make a row for each figure: all ratios after/before, their median, range and the median's 90 % interval."""
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
    """Find where the median of as many draws from these ratios lies in 90 of 100 cases (percentile bootstrap)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[round(0.05 * (_RESAMPLES - 1))], medians[round(0.95 * (_RESAMPLES - 1))]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of processes (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each batch is decoded (default: 3)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="requests that decode at once")
    parser.add_argument("--tokens", type=int, default=32, help="generated by each request (default: 32)")
    parser.add_argument("--no-host", dest="host", action="store_false", help="decode only")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
