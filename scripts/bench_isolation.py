"""Does decode keep its pace while long prompts arrive? Colocated against disaggregated, as many cores as devices.

A few requests decode steadily; long prompts arrive at fixed times (open loop) and ask for a few tokens, so that their
KV is handed off and decoded beside the steady requests. Reported per topology: inter-token latency (ITL) of the steady
requests while long prompts are in the engine, and time to first token (TTFT) of the long prompts; then the ratio of
each topology's p99 ITL to that of "prefill=1,decode=1". `both=1` has one core; `both=2` has as many as the
disaggregated engine, and routes each request to one of its two meshes. Each topology runs in a process of its own, held
to as many cores as it has devices (Linux). XLA's threads are shared between the devices of a process, so a device may
use a core that the other leaves idle.

    python scripts/bench_isolation.py --model smollm2 --json isolation.json
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.engine.metrics import Percentiles

DISAGGREGATED = "prefill=1,decode=1"
TOPOLOGIES = ("both=1", "both=2", DISAGGREGATED)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every topology in turn and print a table; `--json` writes the figures."""
    args = _arguments(argv)
    figures = {}
    for topology in TOPOLOGIES:
        print(f"{topology}: running", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            figures[topology] = pool.submit(measure, topology, args).result()
    base = figures[DISAGGREGATED]["itl"]["p99"]
    for topology, row in figures.items():
        row["itl_p99_ratio"] = row["itl"]["p99"] / base
        print(_row(topology, row))
    if args.json:
        report = {"args": vars(args), "machine": platform.platform(), "cores": os.cpu_count(), "figures": figures}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def measure(topology: str, args: argparse.Namespace) -> dict[str, Any]:
    """ITL and TTFT percentiles of one topology, in seconds. Call it in a fresh process: it chooses the cores."""
    from twinmesh.engine.config import Topology

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: Topology.parse(topology).num_devices])
    from twinmesh import LLM  # JAX counts the cores when it starts

    length = max(args.prompt_tokens + args.answer_tokens, args.steady_tokens + 64)
    with LLM(args.model, topology=topology, max_model_len=length, max_num_seqs=8) as llm:
        return _under_load(llm, args)


def _under_load(llm: "LLM", args: argparse.Namespace) -> dict[str, Any]:
    from twinmesh import SamplingParams
    from twinmesh.engine.metrics import Latencies, Percentiles

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


def _row(topology: str, row: dict[str, Any]) -> str:
    itl, ttft = row["itl"], row["ttft"]
    return (
        f"{topology:20} ITL p50 {itl['p50'] * 1e3:7.1f} ms  p99 {itl['p99'] * 1e3:7.1f} ms  "
        f"({row['itl_p99_ratio']:5.1f} x)   TTFT p50 {ttft['p50']:6.2f} s  p99 {ttft['p99']:6.2f} s   "
        f"steady {row['steady_tokens_per_second']:5.1f} tokens/s"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
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
