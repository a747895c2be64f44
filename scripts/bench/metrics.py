"""What metrics cost decode steps: the dispatching thread's time per step, and the gaps between steps, while somebody
scrapes and while nobody does; and what a scrape and the counting itself take.

    python scripts/bench/metrics.py --requests 64 --json metrics.json

The model has random weights and hollow programs, as in `host.py`: steps follow each other as fast as the host lets
them, so what metrics add shows in full. Scrapes go over the port on loopback, at the given rate; Prometheus' own is
one in 15 s or more. Sides take turns.
"""

import argparse
import json
import statistics
import threading
import time
import urllib.request
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import socket

import jax
import jax.numpy as jnp
import numpy as np
from twinmesh.engine.core.engine_core import EngineCore
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.core.mesh_work import MeshWork
from twinmesh.engine.metrics.histograms import Observed, Seen
from twinmesh.engine.metrics.prometheus import MetricsServer
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.protocol.actions import Decode
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.startup.build import start_core
from twinmesh.scripts.bench.host import hollow_out, meshes_of, model_with_layers, random_params, run

_ROUNDS = 5
_SECONDS = 3.0  # that a round takes at least
_REPEATS = 200


class _Gaps(Observer):
    """When steps came back."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def received(self, message: object) -> None:
        """Stamp a step."""
        if isinstance(message, StepResult):
            self.times.append(time.perf_counter())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print figures as JSON and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="running at once")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 1.0, 10.0], help="scrapes a second; 0: none")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    model, dtype, requests = model_with_layers(1), jnp.dtype(jnp.float32), arguments.requests
    options = EngineOptions(
        "random", topology="both=1", dtype=dtype, max_model_len=512, max_num_seqs=requests, prefill_buckets=(512,),
        decode_buckets=(requests,), kv_cache_bytes=512 << 20, max_retries=0,
    )  # fmt: skip
    core, _ = start_core(model, dtype, partial(random_params, model=model), options)
    try:
        hollow_out(core.inspect(meshes_of))
        run(core, requests)  # warm
        rows = _sides(core, requests, arguments.rates)
    finally:
        core.close()
    report = {
        "benchmark": "metrics", "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "requests": requests,
        "sides": rows, "counting_us": _counting(), "observer_us_per_step": _observing(),
    }  # fmt: skip
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


def _sides(core: EngineCore, requests: int, rates: Sequence[float]) -> list[dict[str, float]]:
    found: dict[float, list[dict[str, float]]] = {rate: [] for rate in rates}
    for _ in range(_ROUNDS):
        for rate in rates:
            found[rate].append(_round(core, requests, rate))
    return [
        {
            "scrapes_per_second": rate,
            **{name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]},
        }
        for rate, rows in found.items()
    ]


def _round(core: EngineCore, requests: int, rate: float) -> dict[str, float]:
    """Run all requests to their end, again and again; return milliseconds of one round."""
    gaps = _Gaps()
    with core.observe(gaps), _scraping(core, rate) as scrapes:
        before, start = core.metrics(), time.monotonic()
        while time.monotonic() - start < _SECONDS:
            run(core, requests)
        after = core.metrics()
    steps = np.diff(gaps.times) * 1e3
    return {
        "host_ms_per_step": 1e3 * (after.host_seconds - before.host_seconds) / (after.steps - before.steps),
        "gap_ms_p50": float(np.percentile(steps, 50)),
        "gap_ms_p99": float(np.percentile(steps, 99)),
        "gap_ms_max": float(steps.max()),
        "scrape_ms": 1e3 * statistics.median(scrapes) if scrapes else 0.0,
    }


@contextmanager
def _scraping(core: EngineCore, rate: float) -> Iterator[list[float]]:
    """Scrape so many times a second meanwhile; yield the seconds that each took."""
    taken: list[float] = []
    if not rate:
        yield taken
        return
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(1 / rate):
            start = time.perf_counter()
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
            taken.append(time.perf_counter() - start)

    with MetricsServer(port) as server:
        server.show(core.metrics)
        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            yield taken
        finally:
            stop.set()
            thread.join()


def _counting() -> dict[str, float]:
    """Return microseconds of the dispatching thread for each request that ends, by the tokens that it has."""
    found = {}
    for tokens in (16, 128, 1024):
        line = Timeline(0.0, 0.1, 0.2, None, 9.0, array("d", [0.01 * n for n in range(1, tokens + 1)]))
        seen, observed, count = Seen(line, tokens, 100, True), Observed(), 64 * _REPEATS
        start = time.thread_time()
        for _ in range(count):
            observed.add(seen)
        found[f"request of {tokens} tokens"] = round(1e6 * (time.thread_time() - start) / count, 2)
    return found


def _observing() -> float:
    """Return microseconds of the dispatching thread for each step, for what is counted by mesh."""
    work = MeshWork(1, time.monotonic)
    results = [StepResult(float(n), 0, n, (), np.zeros((1, 0), np.int32)) for n in range(100 * _REPEATS)]
    actions = [Decode(0, n, 1, 1, ()) for n in range(len(results))]
    start = time.thread_time()
    for action, result in zip(actions, results, strict=True):
        work.performed(action)
        work.received(result)
    return round(1e6 * (time.thread_time() - start) / len(results), 2)


if __name__ == "__main__":
    raise SystemExit(main())
