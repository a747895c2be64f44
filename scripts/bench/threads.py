"""Do the CPU devices of one process leave each other alone? Kernels of decode, alone and beside a prefill.

    twinmesh bench threads --json threads.json

One device of the process decodes: attention of eight requests over 512 tokens of one layer, one product of eight rows,
and all products of a model's layers one after the other, at SmolLM2-135M's sizes. Another runs steps of 512 prompt
tokens without pause: XLA's products of as many layers. Each call is waited for, and its time to the waiting thread
counted, in milliseconds. In turn:

- alone, with all cores, and with the share that a device has while another is at work;
- beside the prefill as if there were no shares; with shares; and with shares and the lower priority that an engine
  with a prefill and a decode mesh gives XLA's pool.

The last column is the p99 over the median of the same call alone with as many threads. The priority stays lowered, so
it comes last, and a process that has measured should end. The machine should be idle otherwise.
"""

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas.attention import paged_decode_attention
from twinmesh.kernels_pallas.cpu import loader
from twinmesh.kernels_pallas.cpu.threads import Cores, lower_pool_priority, process_cores
from twinmesh.kernels_pallas.matmul import matmul

HIDDEN, KV, INNER, HEADS, HEAD_DIM, PAGE = 576, 192, 1536, (9, 3), 64, 64
SHAPES = ((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER),
          (INNER, HIDDEN))  # fmt: skip

type Calls = dict[str, Callable[[], Array]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line for each kernel and case; return the exit code."""
    args = _arguments(argv)
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if loader.toolchain() is None:
        print("This process has no CPU kernels: the log says why.", file=sys.stderr)
        return 1
    jax.config.update("jax_num_cpu_devices", 2)
    rows = measure(args)
    if args.json:
        report: dict[str, Any] = {"args": vars(args), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        report |= {"machine": platform.platform(), "cores": process_cores().count}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every case in turn; returns a row for each kernel in each."""
    prefill, calls, cores = prefill_step(args), decode_calls(args), process_cores()
    for call in (prefill, *calls.values()):
        jax.block_until_ready(call())
    rows: list[dict[str, Any]] = []

    def take(case: str, steps: list[float] | None) -> None:
        threads = cores.threads
        for name, call in calls.items():
            done = len(steps) if steps is not None else 0
            start = time.perf_counter()
            row: dict[str, Any] = {
                "case": case,
                "kernel": name,
                "threads": threads,
                **summarise(times(call, args.seconds)),
            }
            if steps is not None:
                row["prefill_ms"] = 1e3 * (time.perf_counter() - start) / max(1, len(steps) - done)
            alone = [r for r in rows if r["case"] == "alone" and (r["kernel"], r["threads"]) == (name, threads)]
            row["p99_over_alone"] = row["p99_ms"] / alone[0]["p50_ms"] if alone else 1.0
            rows.append(row)
            print(_line(row), flush=True)

    print(f"a prefill step alone: {1e3 * np.median(times(prefill, args.seconds)):.0f} ms", flush=True)
    take("alone", None)
    with shared(cores):
        if cores.threads < cores.count:
            take("alone", None)
    with running(prefill) as steps:
        take("beside", steps)
        with shared(cores):
            take("beside, shares", steps)
            lower_pool_priority()
            take("beside, shares, priority", steps)
    return rows


def summarise(times: Sequence[float]) -> dict[str, float]:
    """Give the number of calls and their percentiles in milliseconds."""
    p50, p99 = np.percentile(np.asarray(times) * 1e3, (50, 99))
    return {"count": len(times), "p50_ms": float(p50), "p99_ms": float(p99)}


def times(call: Callable[[], Array], seconds: float) -> list[float]:
    """Call again and again for so long, and return the seconds of each call."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return found


@contextmanager
def shared(cores: Cores) -> Iterator[None]:
    """Share the cores as an engine does while two devices are at work."""
    cores.add(2)
    try:
        yield
    finally:
        cores.add(-2)


@contextmanager
def running(prefill: Callable[[], Array]) -> Iterator[list[float]]:
    """Run steps without pause on a thread of their own, two dispatched at a time; yields the times they ended at."""
    ended: list[float] = []
    stop = threading.Event()

    def run() -> None:
        before = prefill()
        while not stop.is_set():
            dispatched = prefill()
            jax.block_until_ready(before)
            before = dispatched
            ended.append(time.perf_counter())
        jax.block_until_ready(before)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        stop.set()
        thread.join()


def prefill_step(args: argparse.Namespace) -> Callable[[], Array]:
    """Make a prefill step of 512 tokens on the first device: products of XLA's."""
    draw = _drawer(jax.devices()[0])
    step = jax.jit(partial(_layers, jnp.matmul))
    return partial(step, draw(512, HIDDEN), [[draw(*shape) for shape in SHAPES] for _ in range(args.layers)])


def decode_calls(args: argparse.Namespace) -> Calls:
    """Make the calls of decode on the second device."""
    device, rows, pages = jax.devices()[1], args.rows, args.length // PAGE
    draw, random = _drawer(device), np.random.default_rng(1)
    x, w = draw(rows, HIDDEN), draw(HIDDEN, INNER)
    layers = [[draw(*shape) for shape in SHAPES] for _ in range(args.layers)]
    pools = [draw(rows * pages, PAGE, HEADS[1], HEAD_DIM) for _ in range(2)]
    table = jax.device_put(random.permutation(rows * pages).reshape(rows, pages).astype(np.int32), device)
    length = jax.device_put(np.full(rows, args.length, np.int32), device)
    attend = jax.jit(partial(paged_decode_attention, scale=HEAD_DIM**-0.5))
    return {
        "attention": partial(attend, draw(rows, HEADS[0], HEAD_DIM), *pools, table, length),
        "product": partial(jax.jit(matmul), x, w),
        "layers": partial(jax.jit(partial(_layers, matmul)), x, layers),
    }


def _layers(multiply: Callable[[Array, Array], Array], x: Array, layers: list[list[Array]]) -> Array:
    for q, k, v, o, gate, up, down in layers:
        mixed = multiply(x, q) + jnp.tile(multiply(x, k) + multiply(x, v), (1, HEADS[0] // HEADS[1]))
        x = x + multiply(mixed, o)
        x = x + multiply(jax.nn.silu(multiply(x, gate)) * multiply(x, up), down)
    return x


def _drawer(device: jax.Device) -> Callable[..., Array]:
    random = np.random.default_rng(0)
    return lambda *shape: jax.device_put(0.02 * random.standard_normal(shape, np.float32), device)


def _line(row: dict[str, Any]) -> str:
    beside = f"   prefill {row['prefill_ms']:5.0f} ms a step" if "prefill_ms" in row else ""
    return (
        f"{row['case']:25} {row['kernel']:10} {row['threads']:2} threads   p50 {row['p50_ms']:8.3f} ms   "
        f"p99 {row['p99_ms']:8.3f} ms   {row['p99_over_alone']:5.1f}{beside}"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=0, help="hold the process to this many cores (0: all; Linux)")
    parser.add_argument("--rows", type=int, default=8, help="requests that decode")
    parser.add_argument("--length", type=int, default=512, help="tokens of each; a multiple of 64")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--seconds", type=float, default=4.0, help="for which each kernel is called in each case")
    parser.add_argument("--json", metavar="FILE", help="file for the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
