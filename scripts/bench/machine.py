"""The two limits that other figures are held against: float32 matrix products and memory reads, on JAX's first device.

    python scripts/bench/machine.py [--cores 1]

Each product and each sum is waited for, best of ten. The sum reads 1 GiB.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print GFLOP/s and GB/s; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cores", type=int, default=0, help="hold the process to this many cores (0: all; Linux)")
    args = parser.parse_args(argv)
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    import jax
    import jax.numpy as jnp

    size = 2048
    matrix = jnp.full((size, size), 1e-3, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    print(f"product {2 * size**3 / best(lambda: product(matrix)) / 1e9:8.1f} GFLOP/s")
    print(f"read    {read_rate() / 1e9:8.1f} GB/s")
    return 0


def read_rate() -> float:
    """Return the bytes per second of reading memory with all cores that the process may use."""
    import jax
    import jax.numpy as jnp

    numbers = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    return numbers.nbytes / best(lambda: total(numbers))


def best(call: Callable[[], object], rounds: int = 10) -> float:
    """Return the seconds of the fastest call, not counting a first one."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
