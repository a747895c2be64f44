"""What worker processes cost a step: from its end on the device to its tokens in the driver, and the driver's time.

    python scripts/bench/workers.py --model smollm2 --json workers.json

Engines in this process and over worker processes take turns, a pair each round; each decodes `--requests` prompts at
once, after a round that does not count. Per engine, as medians over the rounds and of the steps in each:

    to_driver_us          from when a step's result was there, where its mesh is, to when the dispatching thread took it
                          in. Both read the system's one monotonic clock
    dispatch_us           the dispatching thread's own processor time for a step: scheduler, messages, tokens
    process_us            all of the driver process's processor time for a step; in one process that is the model too
    tokens_per_second     of the whole round

A machine that does other things shows in all of them: pairs, not single figures, are to be compared.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.protocol.worker import FromWorker, Posted
from twinmesh.engine.worker.remote.remote_executor import RemoteExecutor

if TYPE_CHECKING:
    from twinmesh import LLM

KINDS = ("in process", "processes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs, print their medians and return the exit code."""
    args = _arguments(argv)
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS:
            rounds[kind].append(measure(args, kind))
            print(f"round {number + 1}, {kind}: {_row(rounds[kind][-1])}", flush=True)
    medians = {kind: _medians(rounds[kind]) for kind in KINDS}
    ratios = {name: medians["processes"][name] / max(medians["in process"][name], 1e-9) for name in medians[KINDS[0]]}
    for kind in KINDS:
        print(f"median, {kind}: {_row(medians[kind])}")
    print("processes over in process: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if args.json:
        report: dict[str, Any] = {"args": vars(args), "date": time.strftime("%Y-%m-%d"), "rounds": rounds}
        report |= {"medians": medians, "ratios": ratios, "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


class Arrivals(Observer):
    """When steps were done and when the dispatching thread took them in; of workers the times that they have sent.

    It listens in place of the executor to what comes from its crew, and passes all of it on.
    """

    def __init__(self, executor: object) -> None:
        self._done: dict[tuple[int, int], float] = {}  # by mesh and step
        self.seconds: list[float] = []
        self._executor = executor
        if isinstance(executor, RemoteExecutor):
            self._heard = executor.heard
            executor.heard = self.heard  # type: ignore[method-assign]

    def heard(self, worker: int, message: FromWorker) -> None:
        """Note when the worker had the results."""
        if isinstance(message, Posted):
            for completion in message.completions:
                if isinstance(completion, StepResult):
                    self._done[completion.mesh, completion.step] = completion.t
        self._heard(worker, message)

    def received(self, message: object) -> None:
        """Note how old a result is when it is taken in."""
        if isinstance(message, StepResult):
            done = self._done.pop((message.mesh, message.step), message.t)
            self.seconds.append(time.monotonic() - done)


def measure(args: argparse.Namespace, kind: str) -> dict[str, float]:
    """Run one round of one engine and return its figures."""
    from twinmesh import LLM

    options = {
        "topology": args.topology, "dtype": args.dtype, "max_num_seqs": args.requests,
        "decode_buckets": (args.requests,), "max_model_len": args.prompt_tokens + args.tokens, "worker_timeout": 60.0,
    }  # fmt: skip
    with LLM(args.model, workers="processes" if kind == "processes" else None, **options) as llm:
        _generate(llm, args, seed=0)
        arrivals: Arrivals = llm.engine.core.inspect(lambda _, executor: Arrivals(executor))
        before, process, start = llm.metrics(), time.process_time(), time.monotonic()
        with llm.engine.core.observe(arrivals):
            tokens = _generate(llm, args, seed=1)
        wall, process, after = time.monotonic() - start, time.process_time() - process, llm.metrics()
    steps = after.steps - before.steps
    return {
        "to_driver_us": 1e6 * statistics.median(arrivals.seconds),
        "dispatch_us": 1e6 * (after.host_seconds - before.host_seconds) / steps,
        "process_us": 1e6 * process / steps,
        "tokens_per_second": tokens / wall,
    }


def _generate(llm: "LLM", args: argparse.Namespace, seed: int) -> int:
    from twinmesh import SamplingParams

    prompts = np.random.default_rng(seed).integers(100, args.vocabulary, (args.requests, args.prompt_tokens))
    outputs = llm.generate(prompts.tolist(), SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True))
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _row(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in figures.items())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What worker processes cost a step.")
    parser.add_argument("--model", default="smollm2", metavar="NAME|PATH", help="(default: %(default)s)")
    parser.add_argument("--topology", default="both=1", metavar="ROLES", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=20_000, metavar="N", help="token ids of prompts are below it")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of engines (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
