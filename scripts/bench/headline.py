"""The headline experiment: bursts of long prompts beside people who chat, disaggregated against colocated.

    python scripts/bench/headline.py --model smollm2 --json headline.json
    python scripts/bench/headline.py --rates 0.5 1 --chunks 64 512 --seconds 40 --json short.json

The SLO is fixed before anything runs under load: TTFT at P90 within 4 times that of the longest prompt alone, TPOT at
P90 within twice that of one request alone, both on `both=1` with the largest chunk, which has all cores for itself.
People send short prompts at random times (Poisson); every `--period` seconds `--burst` long prompts come at once. A
rate multiplies how often both come; at each rate every engine gets the same requests at the same times, by the driver
of `twinmesh bench serve`, whose reports are kept whole in the file.

Engines: `prefill=1,decode=1`; one mesh over all cores and two, which alternate chunks and decode steps, and the same
with `both(mode=fused)`, each with every chunk size of `--chunks`; and `pool=2`, whose roles the planner chooses. Each
runs in a process of its own, on all cores of this one. With `--workers processes` ours is also run with each mesh in a
process of its own, and that is then held against the others.

What is reported: at each rate P99 of the gaps between tokens against the colocated engine that has the shortest of
those whose median TTFT is no later than ours; goodput at the highest rate at which an engine keeps to the SLO, against
the best colocated one's; at which rates a colocated engine has the higher goodput, and what the planner chose there.
`--html` lays them side by side in the page of `twinmesh bench report`.
With `--most` a sweep is made in several runs, which go on where the file of `--json` ends.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from twinmesh.engine.metrics.benchmark_file import About, Benchmark, Point
from twinmesh.engine.metrics.report_file import parse_report, report_json
from twinmesh.engine.options import WORKERS
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.simulation.loads.lengths import Uniform
from twinmesh.engine.simulation.loads.scaling import faster
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.scripts.arguments import check_new
from twinmesh.scripts.bench.headline_verdict import OURS, PLANNED, compare, shown, verdict
from twinmesh.scripts.bench.report import check_plotly, write_page

if TYPE_CHECKING:
    from twinmesh.engine.benchmark.engine_target import EngineTarget

RIVALS = ("both=1", "both(mode=fused)=1", "both=2", "both(mode=fused)=2")
CHUNKS = (32, 64, 128, 256, 512)
TTFT_TIMES, TPOT_TIMES, PERCENTILE = 4.0, 2.0, 90.0  # the SLO, from what a request has alone


class Engine(NamedTuple):
    """One of the engines."""

    topology: str
    chunk: int  # prompt tokens of a step
    workers: str | None = None  # where its meshes live; None: in one process

    def __str__(self) -> str:
        return f"{self.topology}{f' in {self.workers}' if self.workers else ''}, chunk {self.chunk}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine in turn, print a table and what it comes to, and return the exit code."""
    args = arguments(argv)
    if args.html is not None:
        check_new(args.html)
        check_plotly()
    kept = _kept(args)
    rows: list[dict[str, Any]] = kept.get("rows", [])
    if "slo" not in kept:
        kept["slo"] = apart(alone, Engine("both=1", max(args.chunks)), args)
    slo = SLO(**kept["slo"], percentile=PERCENTILE)
    print(f"SLO: TTFT {slo.ttft_ms:.0f} ms, TPOT {slo.tpot_ms:.1f} ms, each for {PERCENTILE:g} % of the requests")
    engines = _engines(args)
    for engine in engines[len(rows) :][: args.most]:
        rows.append(apart(measure, engine, args, slo))
        print(_text(rows[-1]), flush=True)
        _write(args, {"slo": kept["slo"], "rows": rows})
    if len(rows) == len(engines):
        found = compare(rows)
        print(*verdict(found), sep="\n")
        if args.html is not None:
            write_page(args.html, {row["engine"]: _benchmark(row) for row in shown(found, rows)})
    return 0


def _benchmark(row: Mapping[str, Any]) -> Benchmark:
    """Return the measured points of an engine as the report's page takes them."""
    points = [
        Point(
            f"rate {one['rate']:g}", parse_report(json.dumps(one["report"]).encode(), row["engine"]), rate=one["came"]
        )
        for one in row["points"]
    ]
    return Benchmark(About(), tuple(points))


def load(args: argparse.Namespace, rate: float) -> Workload:
    """Return the requests at one rate, in the order of their times: the same ones at any rate, closer together."""
    random = np.random.default_rng(args.seed)
    count = round(args.seconds * args.chats)
    times = np.sort(random.uniform(0, args.seconds, count)).tolist()  # those of a Poisson process, given their number
    pairs = Uniform(args.chat, args.chat_answer).draw(random, count).tolist()
    chats = [WorkRequest(prompt, answer, at) for (prompt, answer), at in zip(pairs, times, strict=True)]
    begins = np.arange(args.period / 2, args.seconds, args.period).tolist()
    longs = [WorkRequest(args.long, args.long_answer, at) for at in begins for _ in range(args.burst)]
    merged = sorted([*chats, *longs], key=lambda one: one.time)
    return faster(Workload(f"chat and bursts of {args.burst} x {args.long} tokens", merged), rate)


def alone(engine: Engine, args: argparse.Namespace) -> dict[str, float]:
    """Return the SLO's times in milliseconds, from what requests have alone. Call it in a fresh process."""
    from twinmesh.engine.benchmark.target import Load

    with started(engine, args, None) as target:
        ttfts, tpots = list[float](), list[float]()
        for _ in range(args.alone):
            lone = [WorkRequest(args.long, 2, 0.0), WorkRequest(args.chat[1], args.chat_answer[1], None, 0, 0.2)]
            records = target.run(Load(Workload("alone", lone))).records
            assert records is not None
            first, second = sorted(records, key=lambda record: record.number)
            assert first.ttft is not None
            assert second.tpot is not None
            ttfts.append(first.ttft)
            tpots.append(second.tpot)
    return {"ttft_ms": TTFT_TIMES * 1e3 * median(ttfts), "tpot_ms": TPOT_TIMES * 1e3 * median(tpots)}


def measure(engine: Engine, args: argparse.Namespace, slo: SLO) -> dict[str, Any]:
    """Run one engine at every rate. Call it in a fresh process."""
    from twinmesh.engine.benchmark.target import Load

    points = []
    with started(engine, args, slo) as target:
        for rate in args.rates:
            asked = load(args, rate)
            measured = target.run(Load(asked))
            report = measured.report
            assert report.itl is not None
            assert report.ttft is not None
            assert report.tpot is not None
            assert report.goodput is not None
            points.append(
                {
                    "rate": rate, "came": len(list(asked.requests)) * rate / args.seconds,
                    "itl_p99": report.itl.p99, "ttft_p50": report.ttft.p50, "ttft_p90": report.ttft.p90,
                    "tpot_p90": report.tpot.p90, "goodput": report.goodput.per_second, "share": report.goodput.share,
                    "is_attained": report.goodput.is_attained, "ended": report.ended,
                    "late_p99": report.late.p99 if report.late else None,
                    "roles": [mesh.role for mesh in report.meshes], "flips": len(report.flips),
                    "report": json.loads(report_json(*measured)),
                }
            )  # fmt: skip
    return {"engine": str(engine), "topology": engine.topology, "chunk": engine.chunk, "points": points}


@contextmanager
def started(engine: Engine, args: argparse.Namespace, slo: SLO | None) -> "Iterator[EngineTarget]":
    """Start an engine as a target, and close it in the end."""
    from twinmesh import LLM
    from twinmesh.engine.benchmark.engine_target import EngineTarget

    longest = max(args.long + args.long_answer, args.chat[1] + args.chat_answer[1])
    buckets = (*(size for size in CHUNKS if size < engine.chunk), engine.chunk)
    with LLM(
        args.model, topology=engine.topology, dtype=args.dtype, max_model_len=longest, prefill_buckets=buckets,
        max_num_seqs=args.max_num_seqs, slo=slo, workers=engine.workers,
    ) as llm:  # fmt: skip
        yield EngineTarget(llm, args.model)


def _text(row: Mapping[str, Any]) -> str:
    lines = [
        f"{row['engine']:32} rate {point['rate']:4g}  ITL p99 {1e3 * point['itl_p99']:7.1f} ms  TTFT p50 "
        f"{point['ttft_p50']:6.2f} s p90 {point['ttft_p90']:6.2f} s  TPOT p90 {1e3 * point['tpot_p90']:7.1f} ms  "
        f"goodput {point['goodput']:5.2f}/s ({point['share']:4.0%}){'  kept' if point['is_attained'] else ''}"
        for point in row["points"]
    ]
    return "\n".join(lines)


def apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _engines(args: argparse.Namespace) -> list[Engine]:
    own = [Engine(topology, args.our_chunk) for topology in (OURS, PLANNED)]
    if args.workers is not None:
        own.insert(0, Engine(OURS, args.our_chunk, args.workers))  # the first of ours is what the verdict is about
    return own + [Engine(topology, chunk) for topology, chunk in product(args.rivals, args.chunks)]


def _kept(args: argparse.Namespace) -> dict[str, Any]:
    """Read what earlier runs of this sweep have measured.

    Raises:
        SystemExit: the file is of a sweep with other arguments, or of a sweep that is not to be gone on with.
    """
    if not args.json or not Path(args.json).exists():
        return {}
    if args.most is None:
        raise SystemExit(f"headline: {args.json} exists: give another name, or --most to go on with it.")
    kept: dict[str, Any] = json.loads(Path(args.json).read_text())
    if kept["args"] != _compared(args):
        raise SystemExit(
            f"headline: {args.json} holds a sweep with other arguments, {kept['args']}: give another file."
        )
    return kept


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    compared = {name: value for name, value in vars(args).items() if name not in ("json", "html", "most")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in compared.items()}


def _write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        done = len(found["rows"]) == len(_engines(args))
        came_to = {"verdict": compare(found["rows"])} if done else {}
        Path(args.json).write_text(json.dumps({"args": _compared(args), **about, **found, **came_to}))


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        span = int(low), int(high or low)
    except ValueError:
        span = 0, 0
    if not 1 <= span[0] <= span[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of tokens: write as in 32-64")
    return span


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; None: those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="prompt tokens in a rival's step")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS))
    parser.add_argument("--our-chunk", type=int, default=512)
    parser.add_argument("--workers", choices=WORKERS, help="run ours with its meshes in such workers as well")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at rate 1")
    parser.add_argument("--chats", type=float, default=1.0, help="short requests a second at rate 1")
    parser.add_argument("--chat", type=_span, default=(16, 64), metavar="N-N", help="tokens of their prompts")
    parser.add_argument("--chat-answer", type=_span, default=(16, 48), metavar="N-N", help="of their answers")
    parser.add_argument("--period", type=float, default=15.0, help="seconds between bursts at rate 1")
    parser.add_argument("--burst", type=int, default=3, help="long prompts of a burst")
    parser.add_argument("--long", type=int, default=1024, help="tokens of a long prompt")
    parser.add_argument("--long-answer", type=int, default=8)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--alone", type=int, default=3, help="runs of requests alone, whose median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, metavar="N", help="measure N engines more and leave the rest to later runs")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--html", metavar="PAGE", help="the page of ours, the planner's and the best colocated engines")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
