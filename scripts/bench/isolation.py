"""Does decode keep its pace while long prompts arrive? Colocated, chunk size swept, against disaggregated.

A few requests decode steadily; long prompts arrive at fixed times (open loop), the same for every engine, and ask for a
few tokens, so that their KV is handed off and decoded beside the steady requests. Reported per engine: inter-token
latency (ITL) of the steady requests while long prompts are in the engine, and time to first token (TTFT) of the long
prompts. The rivals are `both=2`, which alternates prompt chunks and decode steps on each of its two meshes, and
`both(mode=fused)=2`, which packs them into one step, with every chunk size of `--chunks`: small chunks make short gaps
and late first tokens. The last lines hold "prefill=1,decode=1" against the best of them: the one with the lowest p99
ITL of all, and the one with the lowest among those whose median TTFT is no later than the disaggregated one's.

Each engine runs in a process of its own, held to as many cores as it has devices (Linux). XLA's threads are shared
between the devices of a process, so a device may use a core that the other leaves idle.

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
    from twinmesh.engine.metrics.metrics import Percentiles

DISAGGREGATED = "prefill=1,decode=1"
RIVALS = ("both=2", "both(mode=fused)=2")
CHUNKS = (64, 128, 256, 512)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine in turn, print a table and return the exit code; `--json` writes the figures."""
    args = _arguments(argv)
    rows: list[dict[str, Any]] = []
    for topology, chunk in [(DISAGGREGATED, args.disaggregated_chunk), *product(args.rivals, args.chunks)]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, topology, chunk, args).result())
        print(_row(rows[-1]), flush=True)
    verdict = compare(rows[0], rows[1:])
    print(*(f"{name}: {value}" for name, value in verdict.items()), sep="\n")
    if args.json:
        report: dict[str, Any] = {
            "args": vars(args),
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
            "verdict": verdict,
        }
        report |= {"machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def compare(ours: dict[str, Any], rivals: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare our p99 ITL and median TTFT with those of the best rivals: of all, and of those with a TTFT as early.

    A ratio is the rival's over ours, so that above 1 we are faster; `steady_tokens_ratio`, of rates, is ours over
    theirs.
    """

    def against(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        best = min(rows, key=lambda row: row["itl"]["p99"], default=None)
        if best is None:
            return None
        return {
            "rival": f"{best['topology']}, chunk {best['chunk']}",
            "itl_p99_ratio": best["itl"]["p99"] / ours["itl"]["p99"],
            "ttft_p50_ratio": best["ttft"]["p50"] / ours["ttft"]["p50"],
            "steady_tokens_ratio": ours["steady_tokens_per_second"] / best["steady_tokens_per_second"],
        }

    as_early = [row for row in rivals if row["ttft"]["p50"] <= ours["ttft"]["p50"]]
    return {"against_the_best": against(rivals), "against_the_best_with_ttft_as_early": against(as_early)}


def measure(topology: str, chunk: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine and return its ITL and TTFT in seconds. Call it in a fresh process: it chooses the cores."""
    from twinmesh.engine.topology import Topology

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: Topology.parse(topology).num_devices])
    from twinmesh import LLM

    length = max(args.prompt_tokens + args.answer_tokens, args.steady_tokens + 64)
    buckets = (*(size for size in CHUNKS if size < chunk), chunk)
    options = {"topology": topology, "dtype": args.dtype, "max_model_len": length, "prefill_buckets": buckets}
    with LLM(args.model, max_num_seqs=8, **options) as llm:
        return {"topology": topology, "chunk": chunk, **_under_load(llm, args)}


def _under_load(llm: "LLM", args: argparse.Namespace) -> dict[str, Any]:
    from twinmesh import SamplingParams
    from twinmesh.engine.metrics.metrics import Latencies, Percentiles

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
        "itl": _percentiles(Percentiles.of(gaps)),
        "ttft": _percentiles(Latencies.of(lines).ttft),
        "steady_tokens_per_second": len(gaps) / (end - start),
        "seconds": end - start,
    }


def _percentiles(values: "Percentiles | None") -> dict[str, float]:
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
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="prompt tokens in a step of the rivals")
    parser.add_argument("--rivals", nargs="+", default=RIVALS)
    parser.add_argument("--disaggregated-chunk", type=int, default=512)
    parser.add_argument("--running", type=int, default=4, help="requests that decode all the while")
    parser.add_argument("--steady-tokens", type=int, default=2000, help="most tokens that each of them generates")
    parser.add_argument("--prompts", type=int, default=4, help="long prompts that arrive")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--answer-tokens", type=int, default=16, help="generated for each; 2 or more are handed off")
    parser.add_argument("--period", type=float, default=10.0, help="seconds between arrivals")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
