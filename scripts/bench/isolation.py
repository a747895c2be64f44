"""Does decode keep its pace while long prompts arrive? Colocated, chunk size swept, against disaggregated.

A few requests decode steadily; long prompts arrive at fixed times (open loop), the same for every engine, and ask for a
few tokens, so that their KV is handed off and decoded beside the steady requests. Reported per engine: inter-token
latency (ITL) of the steady requests while long prompts are in the engine, and time to first token (TTFT) of the long
prompts. Every engine has all cores of the process. The rivals are one mesh over all of them (`both=1`) and two
(`both=2`), which alternate prompt chunks and decode steps, and the same with `both(mode=fused)`, which packs them into
one step, each with every chunk size of `--chunks`: small chunks make short gaps and late first tokens. The last lines
hold "prefill=1,decode=1" against every rival whose median TTFT is at most 1.1 times its own, or if there is none, the
one that comes nearest.

Each engine runs in a process of its own. A sweep takes long: with `--most` it can be made in several runs, which go on
where the figures in the file of `--json` end; other arguments must be the same.

    python scripts/bench/isolation.py --model smollm2 --json isolation.json
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.engine.metrics.distribution import Distribution

DISAGGREGATED = "prefill=1,decode=1"
RIVALS = ("both=1", "both(mode=fused)=1", "both=2", "both(mode=fused)=2")
CHUNKS = (32, 64, 128, 256, 512)
AS_EARLY = 1.1  # times our TTFT


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine in turn, print a table and return the exit code; `--json` writes the figures."""
    args = _arguments(argv)
    rows = _measured(args)
    engines = [(DISAGGREGATED, args.disaggregated_chunk), *product(args.rivals, args.chunks)]
    print(*map(_row, rows), sep="\n", end="\n" * bool(rows))
    for topology, chunk in engines[len(rows) :][: args.most]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, topology, chunk, args).result())
        print(_row(rows[-1]), flush=True)
        _write(args, rows)
    if len(rows) == len(engines):
        print(*map(_verdict, compare(rows[0], rows[1:])), sep="\n")
    return 0


def _measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read what earlier runs of this sweep have measured.

    Raises:
        SystemExit: the file is of a sweep with other arguments.
    """
    if not args.json or args.most is None or not Path(args.json).exists():
        return []
    report = json.loads(Path(args.json).read_text())
    if report["args"] != _compared(args):
        raise SystemExit(f"{args.json} holds a sweep with other arguments, {report['args']}: give another file.")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("json", "most")}


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        report: dict[str, Any] = {"args": _compared(args), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        report |= {"machine": platform.platform(), "cores": os.cpu_count()}
        report["verdict"] = compare(rows[0], rows[1:])
        Path(args.json).write_text(json.dumps(report, indent=1))


def compare(ours: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare our p99 ITL and median TTFT with those of every rival whose TTFT is about as early, or of the nearest.

    A ratio is the rival's over ours, so that above 1 we are faster; `steady_tokens_ratio`, of rates, is ours over
    theirs. The rival with the lowest p99 comes first.
    """
    latest = AS_EARLY * ours["ttft"]["p50"]
    held = [row for row in rivals if row["ttft"]["p50"] <= latest]
    held = held or sorted(rivals, key=lambda row: float(row["ttft"]["p50"]))[:1]
    return [
        {
            "rival": f"{row['topology']}, chunk {row['chunk']}",
            "is_as_early": row["ttft"]["p50"] <= latest,
            "itl_p99_ratio": row["itl"]["p99"] / ours["itl"]["p99"],
            "ttft_p50_ratio": row["ttft"]["p50"] / ours["ttft"]["p50"],
            "steady_tokens_ratio": ours["steady_tokens_per_second"] / row["steady_tokens_per_second"],
        }
        for row in sorted(held, key=lambda row: float(row["itl"]["p99"]))
    ]


def _verdict(row: dict[str, Any]) -> str:
    which = "as early" if row["is_as_early"] else "later, but the nearest"
    return (
        f"against {row['rival']} ({which}, TTFT p50 {row['ttft_p50_ratio']:.2f} of ours): "
        f"ITL p99 {row['itl_p99_ratio']:.2f} times ours, {row['steady_tokens_ratio']:.2f} times its steady tokens"
    )


def measure(topology: str, chunk: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine and return its ITL and TTFT in seconds. Call it in a fresh process."""
    from twinmesh import LLM

    length = max(args.prompt_tokens + args.answer_tokens, args.steady_tokens + 64)
    buckets = (*(size for size in CHUNKS if size < chunk), chunk)
    options = {"topology": topology, "dtype": args.dtype, "max_model_len": length, "prefill_buckets": buckets}
    with LLM(args.model, max_num_seqs=8, **options) as llm:
        return {"topology": topology, "chunk": chunk, **_under_load(llm, args)}


def _under_load(llm: "LLM", args: argparse.Namespace) -> dict[str, Any]:
    from twinmesh import SamplingParams
    from twinmesh.engine.metrics.distribution import Distribution
    from twinmesh.engine.metrics.metrics import Latencies

    steady = SamplingParams(temperature=0, max_tokens=args.steady_tokens, ignore_eos=True)
    running = [llm.stream(f"Count to one hundred: {i},", steady) for i in range(args.running)]
    deltas = [iter(stream) for stream in running]  # kept: an iterator that is dropped aborts its request
    for delta in deltas:
        next(delta)
    answer = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)
    start, arrived = time.monotonic(), []
    for index in range(args.prompts):
        time.sleep(max(0.0, start + index * args.period - time.monotonic()))
        prompt = [100 + (index * 7919 + i) % 20_000 for i in range(args.prompt_tokens)]
        arrived.append(llm.stream(prompt, answer))
    lines = [stream.result().timeline for stream in arrived]
    end = time.monotonic()
    for stream in running:
        stream.close()
    gaps = []
    for stream in running:
        stamps = [t for t in stream.result().timeline.tokens if start <= t <= end]
        gaps += [b - a for a, b in pairwise(stamps)]
    return {
        "itl": _percentiles(Distribution.of(gaps)),
        "ttft": _percentiles(Latencies.of(lines).ttft),
        "steady_tokens_per_second": len(gaps) / (end - start),
        "seconds": end - start,
    }


def _percentiles(values: "Distribution | None") -> dict[str, float]:
    assert values is not None
    return {"count": values.count, "p50": values.p50, "p99": values.p99}


def _row(row: dict[str, Any]) -> str:
    itl, ttft = row["itl"], row["ttft"]
    return (
        f"{row['topology']:18} chunk {row['chunk']:4}   ITL p50 {itl['p50'] * 1e3:7.1f} ms  "
        f"p99 {itl['p99'] * 1e3:7.1f} ms   TTFT p50 {ttft['p50']:6.2f} s  p99 {ttft['p99']:6.2f} s   "
        f"steady {row['steady_tokens_per_second']:5.1f} tokens/s"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="prompt tokens in a rival's step")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS))
    parser.add_argument("--disaggregated-chunk", type=int, default=512)
    parser.add_argument("--running", type=int, default=4, help="requests that decode all the while")
    parser.add_argument("--steady-tokens", type=int, default=2000, help="most tokens that each of them generates")
    parser.add_argument("--prompts", type=int, default=4, help="long prompts that arrive")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--answer-tokens", type=int, default=16, help="generated for each; 2 or more are handed off")
    parser.add_argument("--period", type=float, default=10.0, help="seconds between arrivals")
    parser.add_argument("--most", type=int, metavar="N", help="measure N engines more and leave the rest to later runs")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
