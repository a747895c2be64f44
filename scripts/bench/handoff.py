"""The cost of handing KV over: bytes, seconds and bytes per second by prompt length, against a plain copy of the bytes.

    python scripts/bench/handoff.py --model smollm2 --json handoff.json

Prompts of each length go one at a time through "prefill=1,decode=1", so that nothing else is in a transfer's way. Per
length, as medians over `--rounds`:

    bytes, transfers      KV and request state moved, and in how many transfers (long prompts leave in parts)
    in_flight_seconds     dispatch to arrival of each transfer, added up; a transfer is dispatched before its KV is
                          computed, so this holds the rest of the prefill as well
    exposed_seconds       first token to KV ready: what a request waits for before its second token is computed
    hidden                1 - exposed / in flight: the share that passes while the prompt is still being computed
    copy_seconds          a copy of as many bytes from one numpy array to another, best of ten

`exposed_bytes_per_second` is bytes over exposed seconds: above what a copy reaches where most of it was hidden. What a
transfer costs on an idle engine, gather and copy alone, is in `links`, as the engine times it.
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

if TYPE_CHECKING:
    from twinmesh import LLM

TOPOLOGY = "prefill=1,decode=1"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every length, print a row for each and return the exit code."""
    args = _arguments(argv)
    from twinmesh import LLM

    length = max(args.lengths) + args.tokens
    options = {"topology": TOPOLOGY, "dtype": args.dtype, "max_model_len": length, "max_num_seqs": 4}
    with LLM(args.model, enable_prefix_caching=False, **options) as llm:
        rows = []
        for prompt_tokens in args.lengths:
            measure(llm, prompt_tokens, args.tokens, seed=0)  # warm
            rounds = [measure(llm, prompt_tokens, args.tokens, seed=1 + i) for i in range(args.rounds)]
            rows.append(summarise(prompt_tokens, rounds))
            print(_row(rows[-1]), flush=True)
        links = time_idle_links(llm)
    for link in links:
        print(f"idle, {link['bytes'] / 1e6:.1f} MB: {link['bytes_per_second'] / 1e9:.1f} GB/s")
    if args.json:
        report: dict[str, Any] = {"args": vars(args), "date": time.strftime("%Y-%m-%d"), "rows": rows, "links": links}
        report |= {"machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(llm: "LLM", prompt_tokens: int, tokens: int, seed: int) -> dict[str, float]:
    """Run one prompt alone and return what its hand-off moved and how long it took, in seconds."""
    from twinmesh import SamplingParams

    prompt = np.random.default_rng(seed).integers(100, 20_000, prompt_tokens).tolist()
    before = llm.metrics()
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    after = llm.metrics()
    exposed = output.timeline.handoff
    assert exposed is not None  # with two tokens or more there is a hand-off
    return {
        "bytes": after.handoff_bytes - before.handoff_bytes,
        "transfers": after.handoffs - before.handoffs,
        "in_flight_seconds": after.handoff_seconds - before.handoff_seconds,
        "exposed_seconds": exposed,
        "ttft": output.timeline.ttft or 0.0,
    }


def summarise(prompt_tokens: int, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of the rounds, and the time of the copy that they are compared with."""
    row: dict[str, Any] = {"prompt_tokens": prompt_tokens}
    row |= {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    exposed, copy = row["exposed_seconds"], copy_seconds(int(row["bytes"]))
    return row | {
        "hidden": 1 - exposed / row["in_flight_seconds"] if row["in_flight_seconds"] else None,
        "exposed_bytes_per_second": row["bytes"] / exposed if exposed else None,
        "copy_seconds": copy,
        "copy_bytes_per_second": row["bytes"] / copy,
        "exposed_over_copy": exposed / copy,
    }


def copy_seconds(size: int, rounds: int = 10) -> float:
    """Return the seconds of the fastest of several copies of `size` bytes within this process's memory."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return min(times)


def time_idle_links(llm: "LLM") -> list[dict[str, float]]:
    """Time transfers on an idle engine, as it does itself at start-up on a GPU, but on any device."""
    from twinmesh.engine.startup.links import Link, time_links
    from twinmesh.engine.worker.local_executor import LocalExecutor

    def idle(_: object, executor: object) -> list[Link]:
        assert isinstance(executor, LocalExecutor)
        return time_links(executor.meshes, time.monotonic)

    links = llm.engine.core.inspect(idle)
    return [{"bytes": link.bytes, "seconds": link.seconds, "bytes_per_second": link.rate} for link in links]


def _row(row: dict[str, Any]) -> str:
    return (
        f"{row['prompt_tokens']:6} tokens  {row['bytes'] / 1e6:7.1f} MB in {row['transfers']:.0f}   "
        f"exposed {row['exposed_seconds'] * 1e3:7.1f} ms   in flight {row['in_flight_seconds'] * 1e3:8.1f} ms   "
        f"copy {row['copy_seconds'] * 1e3:6.1f} ms ({row['copy_bytes_per_second'] / 1e9:.1f} GB/s)   "
        f"TTFT {row['ttft'] * 1e3:7.0f} ms"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=4, help="generated by each, 2 or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
