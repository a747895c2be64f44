"""How fast this machine multiplies in float32 and bfloat16, by rows, and what `dtype="auto"` chooses here.

    python scripts/bench/dtype.py --rows 1 8 32 64 256 --json dtype.json

A product of n rows with a square matrix in each dtype, alternating, each waited for, the fastest of `--trials` each;
the first round compiles and does not count. The table of `engine/startup/dtype.py` rests on these figures; a start of
an engine measures nothing.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a row for each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--side", type=int, default=2048, help="of the matrix")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    from twinmesh.engine.startup.dtype import FEWEST_ROWS_FOR_16_BITS, fastest_on_cpu, read_cpu_flags

    found = [measure(rows, args.side, args.trials) for rows in args.rows]
    flags = read_cpu_flags()
    for row in found:
        speeds = "  ".join(f"{dtype} {row[dtype]:7.0f} GFLOP/s" for dtype in DTYPES)
        print(f"{row['rows']:5} rows  {speeds}  bfloat16 / float32 {row['bfloat16'] / row['float32']:.2f}")
    shown = ", ".join(sorted(flag for flag in flags if flag.startswith(("avx", "amx", "bf16", "sve")))) or "none known"
    print(
        f"auto on a CPU like this one, from {FEWEST_ROWS_FOR_16_BITS} rows: {fastest_on_cpu(flags)}  (flags: {shown})"
    )
    if args.json:
        report = {"args": vars(args), "machine": platform.platform(), "flags": sorted(flags), "rows": found}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def measure(rows: int, side: int, trials: int) -> dict[str, Any]:
    """Return GFLOP/s of each dtype for a product of `rows` rows."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    operands = {dtype: (jnp.ones((rows, side), dtype), jnp.ones((side, side), dtype)) for dtype in DTYPES}
    rounds = [{dtype: _seconds(product, *pair) for dtype, pair in operands.items()} for _ in range(trials + 1)]
    flops = 2 * rows * side * side
    return {"rows": rows} | {dtype: flops / min(times[dtype] for times in rounds[1:]) / 1e9 for dtype in DTYPES}


def _seconds(product: "jax.stages.Wrapped", x: "jax.Array", y: "jax.Array") -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(product(x, y))
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
