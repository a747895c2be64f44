"""Roles that change while answers stream: a spike of long prompts into steady decode, and a flip in the middle of it.

    python scripts/bench/flip.py --model smollm2 --json flip.json

Two meshes of a pool. A few requests decode steadily; then long prompts arrive at fixed times (open loop), each for a
few tokens. For each of the two ways, `both=1,decode=1` -> `prefill=1,decode=1` and back, a run is a pair: the same
spike with the first roles all the while, and with a call of `set_roles` in the middle. Reported per pair:

- the spike without a flip: ITL of the steady answers while it lasts, and TTFT of the long prompts;
- gaps at the flip, those of the steady answers that lie in the time from the call to 2 s after it returned or overlap
  with it: p99 and the longest, as multiples of the median ITL of the same answers in the spike without a flip. p99
  should be at most 3, the longest at most 10;
- every gap above 3 times that median, and what ran on its meshes meanwhile (`watched_engine.py`);
- seconds of the call.

The medians of `--runs` pairs count. Besides: the seconds of a flip of an idle engine, which has nothing to drain (below
1 s), and of the start of the pool, whose meshes compile for every role, beside that of the same meshes with fixed roles
(both in processes of their own; `start.py` starts without what was compiled before).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.engine.api.streams import RequestStream
    from twinmesh.scripts.bench.watched_engine import Gap, Watch

POOL, FIXED = "pool=2xtp1", "prefill=1,decode=1"
SHARED, APART = "both=1,decode=1", "prefill=1,decode=1"
WAYS = ((SHARED, APART), (APART, SHARED))
AFTER = 2.0  # seconds after the call that count
MOST_P99, MOST_LONGEST, MOST_IDLE = 3.0, 10.0, 1.0
_BEGUN = 8  # tokens of each steady request before the spike


class Spike(NamedTuple):
    """What was seen of one spike."""

    itl: list[float]  # of the steady answers while it lasted
    ttft: list[float]  # of the long prompts
    gaps: list["Gap"]  # of the steady answers at the flip; none without one
    call: float  # seconds of the call


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each pair and the medians; return the exit code."""
    args = _arguments(argv)
    report: dict[str, Any] = {"args": vars(args), "date": time.strftime("%Y-%m-%d %H:%M")}
    report |= {"machine": platform.platform(), "cores": os.cpu_count()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        report["start_seconds"] = {FIXED: pool.submit(start, FIXED, None, args).result()}
        report |= pool.submit(measure, args).result()
    report["start_seconds"][POOL] = report.pop("pool_start_seconds")
    report["summary"] = summarise(report["pairs"], report["idle_seconds"])
    print("start", {name: f"{seconds:.2f} s" for name, seconds in report["start_seconds"].items()})
    print("median", json.dumps(report["summary"]))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def start(topology: str, roles: str | None, args: argparse.Namespace) -> float:
    """Return the seconds that an engine takes to start."""
    begin = time.perf_counter()
    with _engine(topology, roles, args):
        return time.perf_counter() - begin


def _engine(topology: str, roles: str | None, args: argparse.Namespace) -> "LLM":
    from twinmesh import LLM

    length = max(args.prompt_tokens + args.answer_tokens, args.steady_tokens + 64)
    options: dict[str, Any] = {} if roles is None else {"roles": roles}
    chunks = tuple(sorted({min(64, args.chunk), args.chunk}))
    return LLM(
        args.model, topology=topology, dtype=args.dtype, max_model_len=length, max_num_seqs=8, prefill_buckets=chunks,
        decode_buckets=(8,), **options,
    )  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all pairs on one engine. Call it in a fresh process."""
    from twinmesh.scripts.bench.watched_engine import Watch

    begin, pairs, watch = time.perf_counter(), [], Watch()
    with _engine(POOL, SHARED, args) as llm, llm.engine.core.observe(watch):
        seconds = time.perf_counter() - begin
        calls = [_set_roles(llm, roles) for _ in range(args.runs) for roles in (APART, SHARED)]
        run_spike(llm, watch, SHARED, None, args)  # not counted
        for _ in range(args.runs):
            for first, then in WAYS:
                pairs.append(
                    pair(watch, run_spike(llm, watch, first, None, args), run_spike(llm, watch, first, then, args))
                )
                pairs[-1] |= {"from": first, "to": then}
                print(_line(pairs[-1]), flush=True)
    return {"pool_start_seconds": seconds, "idle_seconds": [end - begin for begin, end in calls], "pairs": pairs}


def _set_roles(llm: "LLM", roles: str) -> tuple[float, float]:
    """Set the roles; return when the call began and ended, on the engine's clock."""
    begin = time.monotonic()
    llm.set_roles(roles)
    return begin, time.monotonic()


def run_spike(llm: "LLM", watch: "Watch", roles: str, goal: str | None, args: argparse.Namespace) -> Spike:
    """Let steady answers decode with these roles while long prompts arrive; in the middle, set the roles `goal`."""
    from twinmesh import SamplingParams

    _set_roles(llm, roles)
    answer = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)
    steady = SamplingParams(temperature=0, max_tokens=args.steady_tokens, ignore_eos=True)
    prompts = [_prompt(index, 16) for index in range(args.running)]
    running = [llm.stream(prompt, steady) for prompt in prompts]
    deltas = [iter(stream) for stream in running]  # kept: an iterator that is dropped aborts its request
    for delta in deltas:
        for _ in range(_BEGUN):
            next(delta)
    ids = [watch.request(prompt) for prompt in prompts]
    with ThreadPoolExecutor(1) as caller:  # prompts arrive at their times, however long the call takes
        begin, flip = time.monotonic(), None
        arrived: list[RequestStream] = []
        for index in range(args.prompts):
            time.sleep(max(0.0, begin + index * args.period - time.monotonic()))
            arrived.append(llm.stream(_prompt(1000 + index, args.prompt_tokens), answer))
            if goal is not None and index == args.prompts // 2:
                flip = caller.submit(_set_roles, llm, goal)
        lines = [stream.result().timeline for stream in arrived]
        end = time.monotonic()
        call, returned = (end, end) if flip is None else flip.result()
    if goal is not None:
        time.sleep(max(0.0, returned + AFTER - time.monotonic()))
    for stream in running:
        stream.close()
        stream.result()
    itl = [gap.seconds for id_ in ids for gap in watch.gaps(id_, begin, end)]
    gaps = [gap for id_ in ids for gap in watch.gaps(id_, call, returned + AFTER)] if goal is not None else []
    return Spike(itl, [line.ttft for line in lines if line.ttft is not None], gaps, returned - call)


def _prompt(seed: int, tokens: int) -> list[int]:
    """Make a prompt that shares no page with one of another time: nothing is found in the cache."""
    stamp = time.monotonic_ns()
    return [100 + (stamp >> shift) % 20_000 for shift in (0, 8, 16)] + [
        100 + (seed * 7919 + i) % 20_000 for i in range(tokens - 3)
    ]


def pair(watch: "Watch", without: Spike, flip: Spike) -> dict[str, Any]:
    """Hold the gaps at a flip against the median of the same answers in the same spike without one."""
    from twinmesh.engine.metrics.distribution import Distribution

    base, found, ttft = map(Distribution.of, (without.itl, [gap.seconds for gap in flip.gaps], without.ttft))
    if base is None or found is None or ttft is None:
        raise RuntimeError("the steady requests had ended before the spike was over: give more --steady-tokens.")
    above = sorted((gap for gap in flip.gaps if gap.seconds > MOST_P99 * base.p50), key=lambda gap: -gap.seconds)
    return {
        "spike": {"itl_p50": base.p50, "itl_p99": base.p99, "itl_longest": max(without.itl), "ttft_p50": ttft.p50},
        "gaps": found.count,
        "p99_ratio": found.p99 / base.p50,
        "longest_ratio": max(gap.seconds for gap in flip.gaps) / base.p50,
        "p99_ratio_without": base.p99 / base.p50,
        "longest_ratio_without": max(without.itl) / base.p50,
        "call_seconds": flip.call,
        "above": [{"seconds": gap.seconds, "causes": watch.causes(gap)} for gap in above],
    }


def summarise(pairs: Sequence[dict[str, Any]], idle: Sequence[float]) -> dict[str, Any]:
    """Return the medians for each way, whether they are what was asked for, and the longest flip of an idle engine."""
    ways: dict[str, Any] = {}
    for first, then in dict.fromkeys((row["from"], row["to"]) for row in pairs):
        rows = [row for row in pairs if (row["from"], row["to"]) == (first, then)]
        names = ("p99_ratio", "longest_ratio", "p99_ratio_without", "longest_ratio_without", "call_seconds")
        found: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in names}
        found["is_met"] = found["p99_ratio"] <= MOST_P99 and found["longest_ratio"] <= MOST_LONGEST
        ways[f"{first} -> {then}"] = found
    return ways | {"idle_seconds": max(idle), "idle_is_met": max(idle) < MOST_IDLE}


def _line(row: dict[str, Any]) -> str:
    spike = row["spike"]
    causes = [f"    {1e3 * gap['seconds']:6.0f} ms: {'; '.join(gap['causes'][:3])}" for gap in row["above"][:5]]
    return "\n".join(
        [
            f"{row['from']} -> {row['to']}: spike ITL p50 {1e3 * spike['itl_p50']:.1f} "
            f"p99 {1e3 * spike['itl_p99']:.1f} longest {1e3 * spike['itl_longest']:.0f} ms, "
            f"TTFT p50 {spike['ttft_p50']:.2f} s; flip p99 "
            f"{row['p99_ratio']:.2f}x, longest {row['longest_ratio']:.2f}x of {row['gaps']} gaps, call "
            f"{row['call_seconds']:.2f} s, {len(row['above'])} above {MOST_P99:.0f}x",
            *causes,
        ]
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=5, help="pairs for each way (default: 5)")
    parser.add_argument("--running", type=int, default=4, help="requests that decode all the while (default: 4)")
    parser.add_argument("--steady-tokens", type=int, default=1500, help="most tokens of each of them (default: 1500)")
    parser.add_argument("--prompts", type=int, default=4, help="long prompts that arrive (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--period", type=float, default=3.0, help="seconds between arrivals (default: 3)")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens of a full step (default: 64)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
