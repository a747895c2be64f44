"""How late the driver of `twinmesh bench serve` is: arrivals at a high rate, on an engine that computes nothing.

    python scripts/bench/driver.py --rate 1000 --json driver.json

The engine is a real one of one small layer whose programs are hollow (`host.py` beside this file): they take and give
back the same arrays and compute nothing, so that its scheduler and its threads are what the driver shares Python with.
Requests come at random (Poisson), each with `--prompt` tokens and an answer of `--output`. Reported is by how much each
was in the engine's hands after its time, over `--rounds`, and the round with the median of P99. The aim is less than
1 ms at P99; the exit code is 1 where it is missed.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmesh.engine.core.engine_core import EngineCore

AIM = 0.001  # seconds at P99


class _Words:
    """The tokenizer of an engine that is given ids and asked for no text."""

    vocab_size = 128
    eos_token_ids: frozenset[int] = frozenset()

    def stream(self, *_: object) -> None:
        """Give nothing that turns ids into text: nobody asks for any."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each round, and return the exit code."""
    args = _arguments(argv)
    rounds = measure(args)
    middle = sorted(rounds, key=lambda one: float(one["p99"]))[len(rounds) // 2]
    print(f"median of the rounds: {_text(middle)}; aim {1e3 * AIM:g} ms at P99")
    if args.json:
        about: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
        }
        about |= {"args": vars(args), "rounds": rounds, "median": middle}
        Path(args.json).write_text(json.dumps(about, indent=1))
    return int(middle["p99"] >= AIM)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the rounds on one engine."""
    from twinmesh.engine.api.client import EngineClient
    from twinmesh.engine.benchmark.driver import drive
    from twinmesh.engine.benchmark.target import Load
    from twinmesh.engine.simulation.loads.load_spec import read_workload
    from twinmesh.engine.startup.build import Engine

    load = f"poisson:rate={args.rate},input={args.prompt},output={args.output},seconds={args.seconds}"
    found = []
    with closing(hollow_core(args)) as core:
        words: Any = _Words()
        engine = Engine(core, core.inspect(lambda scheduler, _: scheduler.config), words, words)
        client = EngineClient(engine, seed=0)
        for turn in range(args.rounds + 1):
            driven = drive(client, Load(read_workload(f"{load},seed={turn}")), {}, seed=(turn,))
            if turn:  # the first one warms caches of all kinds
                found.append(row(driven.late, len(driven.records)))
                print(_text(found[-1]), flush=True)
    return found


def hollow_core(args: argparse.Namespace) -> "EngineCore":
    """Start an engine of one small layer, and hollow it out."""
    import jax.numpy as jnp
    from twinmesh.engine.options import EngineOptions
    from twinmesh.engine.startup.build import start_core
    from twinmesh.scripts.bench.host import hollow_out, meshes_of, model_with_layers, random_params

    model, dtype = model_with_layers(1), jnp.dtype(jnp.float32)
    options = EngineOptions(
        "random", dtype="float32", max_model_len=args.prompt + args.output, max_num_seqs=args.seqs,
        prefill_buckets=(args.bucket,), decode_buckets=(args.seqs,), kv_cache_bytes=64 << 20,
    )  # fmt: skip
    core, _ = start_core(model, dtype, partial(random_params, model=model), options)
    hollow_out(core.inspect(meshes_of))
    return core


def row(late: Sequence[float], ended: int) -> dict[str, Any]:
    """Sum up a round."""
    import numpy as np

    p50, p99 = np.percentile(late, (50, 99)).tolist()
    return {"sent": len(late), "ended": ended, "p50": p50, "p99": p99, "max": max(late)}


def _text(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {1e3 * row[name]:.3f} ms" for name in ("p50", "p99", "max"))
    return f"{row['sent']:,} requests, late by {times}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="after one that does not count")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--output", type=int, default=2)
    parser.add_argument("--bucket", type=int, default=512, help="prompt tokens of a step")
    parser.add_argument("--seqs", type=int, default=64, help="requests that decode at once")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
