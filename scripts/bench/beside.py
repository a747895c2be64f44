"""What a batch job beside them costs interactive requests, and what it gets of the engine meanwhile.

    python scripts/bench/beside.py --json beside.json
    python scripts/bench/beside.py --requests 20 --lines 12 --rounds 1 --topologies both=2     # in about ten minutes

Interactive requests come at random (Poisson), of `--prompt` tokens in and `--answer` out, at `--load` of the rate that
the engine was measured to sustain with `--capacity` of them at once. The batch job's lines, of `--line-prompt` in and
`--line-answer` out, never run out. Three runs take turns, `--rounds` times, in one engine: the interactive requests
alone; the job alone, until `--lines` lines are done; both, until the last interactive request has ended. No prompt is
used twice. Every topology has a process of its own.

Targets, of medians over the rounds: TTFT p99 beside the job within 1.2 times that without it, plus one batch chunk (the
median TTFT of single prompts of `--line-prompt` tokens in an idle engine, cut at the chunk); TPOT p99 within 1.2 times;
the job keeps 0.7 of the tokens per second, prompts included, that it has alone.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.engine.api.job_run import JobRun
    from twinmesh.engine.protocol.timeline import Timeline

TTFT_TIMES, TPOT_TIMES, LEAST_SHARE = 1.2, 1.2, 0.7


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every topology, print its rounds and verdict, and return the exit code; `--json` writes the figures."""
    args = _arguments(argv)
    results = []
    for topology in args.topologies:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results.append(pool.submit(measure, topology, args).result())
        print(_rows(results[-1]), flush=True)
        if args.json:
            report: dict[str, Any] = {"args": vars(args), "date": time.strftime("%Y-%m-%d"), "results": results}
            report |= {"machine": platform.platform(), "cores": len(os.sched_getaffinity(0))}
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(topology: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one topology and return its figures. Call it in a fresh process."""
    from twinmesh import LLM

    length = max(args.prompt + args.answer, args.line_prompt + args.line_answer)
    options = {"topology": topology, "dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "max_model_len": length}
    with LLM(args.model, **options) as llm:
        bench = Bench(llm, args)
        chunk, capacity = bench.chunk_seconds(), bench.capacity()
        rounds = [bench.round(index, args.load * capacity) for index in range(args.rounds)]
    figures = {"topology": topology, "chunk_seconds": chunk, "requests_per_second_at_capacity": capacity}
    return figures | {"rounds": rounds, "verdict": verdict(rounds, chunk)}


class Bench:
    """The runs of one engine."""

    def __init__(self, llm: "LLM", args: argparse.Namespace) -> None:
        """Draw all prompts from one seed."""
        self._llm, self._args = llm, args
        self._random = np.random.default_rng(args.seed)

    def chunk_seconds(self) -> float:
        """Return the median time of a batch chunk: of a prompt's first token in an idle engine."""
        tokens = min(self._args.line_prompt, self._llm.config.chunk_size)
        times = [self._llm.stream(self._prompt(tokens), _exactly(1)).result().timeline.ttft for _ in range(6)]
        return statistics.median(time for time in times[1:] if time is not None)

    def capacity(self) -> float:
        """Return how many interactive requests a second the engine sustains."""
        args = self._args
        prompts = [self._prompt(args.prompt) for _ in range(args.capacity)]
        start = time.perf_counter()
        self._llm.generate(prompts, _exactly(args.answer))
        return float(args.capacity / (time.perf_counter() - start))

    def round(self, index: int, rate: float) -> dict[str, Any]:
        """Make the three runs, in an order that turns from round to round; the arrivals are the same in each."""
        gaps = np.random.default_rng((self._args.seed, index)).exponential(1 / rate, self._args.requests)
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "interactive": lambda: _latencies(self._interactive(gaps)),
            "batch": lambda: {"tokens_per_second": self._job_alone()},
            "both": lambda: self._both(gaps),
        }
        names = list(runs)[index % 3 :] + list(runs)[: index % 3]
        found = {name: runs[name]() for name in names}
        return {"requests_per_second": rate, "order": names, **found}

    def _interactive(self, gaps: np.ndarray) -> list["Timeline"]:
        """Send requests so many seconds after each other, and wait for the last."""
        prompts, streams = [self._prompt(self._args.prompt) for _ in gaps], []
        due = time.monotonic()
        for gap, prompt in zip(gaps, prompts, strict=True):
            due += gap
            time.sleep(max(0.0, due - time.monotonic()))
            streams.append(self._llm.stream(prompt, _exactly(self._args.answer)))
        return [stream.result().timeline for stream in streams]

    def _job_alone(self) -> float:
        job = Job(self._run())
        job.wait_for(self._args.lines)
        return job.stop()

    def _both(self, gaps: np.ndarray) -> dict[str, Any]:
        job = Job(self._run())
        job.wait_for(1)
        before = job.standing()
        figures = _latencies(self._interactive(gaps))
        after = job.standing()
        job.stop()
        return {**figures, "tokens_per_second": _rate(before, after)}

    def _run(self) -> "JobRun":
        args, config = self._args, self._llm.config
        window = 4 * config.max_num_seqs * len(config.topology.meshes)
        params = _exactly(args.line_answer)

        def lines() -> Iterator[Any]:
            while True:
                yield self._llm.check_request(self._prompt(args.line_prompt), params)

        return self._llm.run_jobs(lines(), window=window)

    def _prompt(self, tokens: int) -> list[int]:
        ids: list[int] = self._random.integers(100, 20_000, tokens).tolist()
        return ids


class Job:
    """A batch job on a thread of its own."""

    def __init__(self, run: "JobRun") -> None:
        """Start it."""
        self._run, self._done, self._stopped = run, 0, False
        self._first: tuple[float, int] | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with closing(self._run.outputs(every=0.5)) as results:
            for result in results:
                with self._changed:
                    if result is not None:
                        self._done += 1
                        self._first = self._first or self.standing()
                        self._changed.notify_all()
                    if self._stopped:
                        return

    def standing(self) -> tuple[float, int]:
        """Return the time, and the tokens computed so far."""
        return time.monotonic(), self._run.tokens

    def wait_for(self, lines: int) -> None:
        """Wait until so many lines more than the first are done; 1: until the first is."""
        with self._changed:
            self._changed.wait_for(lambda: self._done >= lines)

    def stop(self) -> float:
        """Abort what is left; return the tokens per second since the first line was done."""
        now = self.standing()
        self._stopped = True
        self._thread.join()
        return _rate(self._first, now)


def _rate(before: tuple[float, int] | None, after: tuple[float, int]) -> float:
    return 0.0 if before is None or after[0] <= before[0] else (after[1] - before[1]) / (after[0] - before[0])


def _exactly(tokens: int) -> Any:
    from twinmesh import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _latencies(timelines: Sequence["Timeline"]) -> dict[str, Any]:
    from twinmesh.engine.metrics.metrics import Latencies

    found = Latencies.of(timelines)
    assert found.ttft is not None
    figures = {"ttft": {"p50": found.ttft.p50, "p99": found.ttft.p99}}
    if found.tpot is not None:
        figures["tpot"] = {"p50": found.tpot.p50, "p99": found.tpot.p99}
    return figures


def verdict(rounds: Sequence[dict[str, Any]], chunk: float) -> dict[str, Any]:
    """Hold the medians over the rounds against the targets."""

    def median(run: str, *names: str) -> float:
        values = [round_[run] for round_ in rounds]
        for name in names:
            values = [value[name] for value in values]
        return float(statistics.median(values))

    ttft, ttft_alone = median("both", "ttft", "p99"), median("interactive", "ttft", "p99")
    tpot = median("both", "tpot", "p99") / median("interactive", "tpot", "p99")
    share = median("both", "tokens_per_second") / median("batch", "tokens_per_second")
    return {
        "ttft_p99_ratio": ttft / ttft_alone,
        "ttft_p99_of_target": ttft / (TTFT_TIMES * ttft_alone + chunk),
        "tpot_p99_ratio": tpot,
        "batch_share": share,
        "is_met": ttft <= TTFT_TIMES * ttft_alone + chunk and tpot <= TPOT_TIMES and share >= LEAST_SHARE,
    }


def _rows(result: dict[str, Any]) -> str:
    found = result["verdict"]
    lines = [f"{result['topology']:18} {run:12} " + _row(round_[run]) for round_ in result["rounds"] for run in _RUNS]
    return "\n".join(lines) + (
        f"\n{result['topology']:18} beside the job: TTFT p99 {found['ttft_p99_ratio']:.2f} times, "
        f"{found['ttft_p99_of_target']:.2f} of 1.2 times and a chunk ({result['chunk_seconds']:.2f} s); TPOT p99 "
        f"{found['tpot_p99_ratio']:.2f} times; the job keeps {found['batch_share']:.2f} of its tokens per second: "
        f"{'met' if found['is_met'] else 'missed'}"
    )


_RUNS = ("interactive", "batch", "both")


def _row(figures: dict[str, Any]) -> str:
    parts = []
    if "ttft" in figures:
        parts.append(f"TTFT p50 {figures['ttft']['p50']:6.2f} s  p99 {figures['ttft']['p99']:6.2f} s")
    if "tpot" in figures:
        parts.append(f"TPOT p50 {figures['tpot']['p50'] * 1e3:6.1f} ms  p99 {figures['tpot']['p99'] * 1e3:6.1f} ms")
    if "tokens_per_second" in figures:
        parts.append(f"job {figures['tokens_per_second']:7.1f} tokens/s")
    return "   ".join(parts)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--topologies", nargs="+", default=["both=2", "prefill=1,decode=1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--requests", type=int, default=300, help="interactive ones in a run")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of an interactive prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of its answer")
    parser.add_argument("--load", type=float, default=0.2, help="of the measured capacity")
    parser.add_argument("--capacity", type=int, default=64, help="interactive requests it is measured with")
    parser.add_argument("--lines", type=int, default=500, help="of the job alone")
    parser.add_argument("--line-prompt", type=int, default=512, help="tokens of a line's prompt")
    parser.add_argument("--line-answer", type=int, default=128, help="tokens of its answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
