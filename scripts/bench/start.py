"""Seconds until an engine has started, beside an earlier checkout, in alternating processes that compile everything.

    git worktree add /tmp/before COMMIT
    python scripts/bench/start.py --before /tmp/before --json start.json

Each process has a compile cache of its own, which is empty. A ratio is this checkout's seconds over the earlier one's.
`compilations` counts what JAX compiled meanwhile. The machine should be idle otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
type Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs for each topology and print a line; returns the exit code."""
    args = _arguments(argv)
    if args.start:
        print(json.dumps(start(args.model, args.start, args.dtype)))
        return 0
    checkouts = {"after": HERE} | ({"before": Path(args.before).resolve()} if args.before else {})
    rows = []
    for topology in args.topologies:
        pairs = []
        for index in range(args.pairs):
            order = sorted(checkouts, reverse=index % 2 == 0)
            pairs.append({name: _measure(checkouts[name], topology, args) for name in order})
        rows.append({"topology": topology, **summarise(pairs), "pairs": pairs})
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "pairs"}), flush=True)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def start(model: str, topology: str, dtype: str) -> Figures:
    """Start an engine of the `twinmesh` that this process imports."""
    import jax.monitoring
    from twinmesh import LLM

    compiled: list[float] = []

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    begin = time.perf_counter()
    with LLM(model, topology=topology, dtype=dtype, max_model_len=2048):
        return {"seconds": time.perf_counter() - begin, "compilations": len(compiled), "compiling": sum(compiled)}


def _measure(checkout: Path, topology: str, args: argparse.Namespace) -> Figures:
    """Return the figures of one checkout, by this script in a process that imports the checkout."""
    from twinmesh.scripts.bench.checkouts import report_of  # earlier checkouts, which run this file too, lack it

    options = ["--start", topology, "--model", args.model, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as cache:
        figures: Figures = report_of(checkout, __file__, options, JAX_COMPILATION_CACHE_DIR=cache)
    return figures


def summarise(pairs: Sequence[dict[str, Figures]]) -> dict[str, Any]:
    """Medians of this checkout, and the median of its ratios to the earlier one."""
    row: dict[str, Any] = {
        figure: statistics.median(pair["after"][figure] for pair in pairs) for figure in pairs[0]["after"]
    }
    if "before" in pairs[0]:
        row["before_seconds"] = statistics.median(pair["before"]["seconds"] for pair in pairs)
        row["before_compilations"] = statistics.median(pair["before"]["compilations"] for pair in pairs)
        row["ratio"] = statistics.median(pair["after"]["seconds"] / pair["before"]["seconds"] for pair in pairs)
    return row


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--topologies", nargs="+", default=["both=1", "prefill=1,decode=1"])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
