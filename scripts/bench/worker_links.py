"""KV from one process to another: by shared memory beside memcpy, by JAX's transfer server beside a bare pull.

    python scripts/bench/worker_links.py --json links.json

What moves are the keys and values of `--tokens` tokens of SmolLM2-135M in float32 (94 MB of 2,048), two arrays on one
CPU device, as a hand-off gathers them. A hand-off is timed from the offer until the other process says, through a pipe,
that the arrays are on its device. In each pair memcpy, of as many bytes into memory that was written before, comes
right before or right after it, in turns; likewise a bare pull of the same arrays through a kept connection. A ratio is
of rates, the hand-off's over the other's, in the same pair; the median of the pairs is printed. Linux only.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAYERS, PAGE, HEADS, DIM = 30, 64, 3, 64  # of SmolLM2-135M
_HOST = "127.0.0.1"
_BARE_STREAMS = 4  # as many connections as the link has
_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs of each link and print a line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of one hand-off, in whole pages of 64")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=destination, args=(theirs,), daemon=True)
    process.start()
    rows = measure(ours, args.tokens, args.pairs)
    ours.send(None)
    process.join()
    for name, row in rows.items():
        print(json.dumps({"link": name} | row), flush=True)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def measure(other: Connection, tokens: int, pairs: int) -> dict[str, dict[str, Any]]:
    """Time both links against what they are held to."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from twinmesh.engine.worker.links.shared_memory import SharedMemoryLink
    from twinmesh.engine.worker.links.transfer_server import TransferServerLink

    shape = (LAYERS, tokens // PAGE, PAGE, HEADS, DIM)
    arrays = [jax.block_until_ready(jnp.full(shape, value, jnp.float32)) for value in (1.0, 2.0)]
    sources = [np.asarray(array) for array in arrays]
    targets = [np.zeros_like(source) for source in sources]
    server = bare_server()

    def memcpy() -> float:
        start = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
        return time.perf_counter() - start

    def hand_off(link: Any) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            offer = link.offer(arrays)
            other.send(("fetch", offer))
            other.recv()
            seconds = time.perf_counter() - start
            link.release(offer.uuid)
            return seconds

        return once

    numbers = iter(range(1, 1 << 20))

    def bare() -> float:
        start = time.perf_counter()
        uuid = next(numbers)
        server.await_pull(uuid, arrays)
        other.send(("pull", (server.address(), uuid, shape)))
        other.recv()
        return time.perf_counter() - start

    size = sum(array.nbytes for array in arrays)
    return {
        "shared_memory": compare(hand_off(SharedMemoryLink()), memcpy, pairs, size),
        "transfer_server": compare(hand_off(TransferServerLink(_HOST)), bare, pairs, size),
    }


def compare(ours: Callable[[], float], other: Callable[[], float], pairs: int, size: int) -> dict[str, Any]:
    """Time pairs after three that do not count; return rates in GB/s and the ratio of each pair."""
    for _ in range(3):
        ours()
        other()
    mine, theirs = list[float](), list[float]()
    for pair in range(pairs):
        for timed, times in [(ours, mine), (other, theirs)][:: -1 if pair % 2 else 1]:
            times.append(size / timed() / 1e9)
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {
        "megabytes": size / 1e6, "hand_off_gb_s": statistics.median(mine), "other_gb_s": statistics.median(theirs),
        "ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios],
    }  # fmt: skip


def bare_server() -> Any:
    """Start one of JAX's transfer servers, without a link around it."""
    import jax
    from jax.experimental import transfer

    address = f"{_HOST}:0"
    return transfer.start_transfer_server(jax.local_devices()[0].client, address, [address] * _BARE_STREAMS)


def destination(driver: Connection) -> None:
    """Fetch, in the other process, until there is nothing more to."""
    import jax
    import jax.numpy as jnp
    from twinmesh.engine.worker.links.choice import open_links

    links, server, connections = open_links((0,), _HOST), bare_server(), dict[str, Any]()
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    while (message := driver.recv()) is not None:
        kind, what = message
        if kind == "fetch":
            wanted = [jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=place) for x in what.parcels]
            arrays = links.of(what.link).fetch(what, wanted, _SECONDS)
        else:
            address, uuid, shape = what
            if address not in connections:
                connections[address] = server.connect(address)
            wanted = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)] * 2
            arrays = connections[address].pull(uuid, wanted)
        jax.block_until_ready(arrays)
        driver.send("there")
        del arrays
    links.close()


if __name__ == "__main__":
    sys.exit(main())
