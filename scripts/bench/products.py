"""Products alone: every product of a model's layers, with weights in each of GGUF's formats and in floats.

    twinmesh bench products --rows 1,8,32 --json products.json

A program makes the seven products of each layer one after the other, with a norm between where a decoder has one, at
SmolLM2-135M's sizes unless told; weights are random, and each layer has its own. Times are milliseconds of the whole
program, the best and the median of `--rounds`, in which the ways take turns; "nothing" is the program without products.
The kernel of `kernels_pallas/cpu/blocks.py` multiplies by quantised weights; XLA by floats. The machine should be idle
otherwise.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from twinmesh.kernels_pallas.block_tiles import LAYOUTS, Tiles, shapes
from twinmesh.kernels_pallas.cpu import blocks, loader
from twinmesh.kernels_pallas.cpu.blocks_records import Activations

type Product = Callable[[jax.Array, Any, int], jax.Array]  # (x [rows, k], weights, n) -> [rows, n]
type Way = tuple[Callable[[jax.Array, Any], jax.Array], Any, str]  # program, weights, dtype of activations


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all ways and print a line for each; returns the exit code."""
    args = _arguments(argv)
    ways = make_ways(args)
    rows = []
    for count in (int(text) for text in args.rows.split(",")):
        for way, times in measure(ways, count, args).items():
            rows.append({"rows": count, "way": way, "best_ms": min(times), "median_ms": statistics.median(times)})
            print(f"{count:4} rows  {way:18} {rows[-1]['best_ms']:9.2f} ms best {rows[-1]['median_ms']:9.2f} median")
    if args.json:
        tools = loader.toolchain()
        about: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
        }
        about |= {"level": tools.level.name if tools else None, "args": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(about, indent=1))
    return 0


def make_ways(args: argparse.Namespace) -> dict[str, Way]:
    """Make a program, and weights, for each way to multiply."""
    sizes, random = _sizes(args), np.random.default_rng(0)

    def layers(draw: Callable[[int, int], Any]) -> list[list[Any]]:
        return [[draw(n, k) for n, k in sizes] for _ in range(args.layers)]

    def program(multiply: Product) -> Callable[[jax.Array, Any], jax.Array]:
        return jax.jit(_model(multiply, [n for n, _ in sizes]))

    nothing = program(lambda x, w, n: jnp.broadcast_to(x[:, :1], (x.shape[0], n)))
    ways: dict[str, Way] = {"nothing": (nothing, layers(lambda n, k: None), "float32")}
    for dtype in filter(None, args.floats.split(",")):
        drawn = layers(functools.partial(_draw_floats, dtype, random))
        ways[f"XLA {dtype}"] = program(lambda x, w, n: x @ w), drawn, dtype
    for name in filter(None, args.formats.split(",")):
        drawn = layers(functools.partial(_draw_blocks, name, random))
        for activations in args.activations.split(","):
            ways[f"{name} {activations}"] = program(_by_blocks(name, activations)), drawn, "float32"
    return ways


def measure(ways: dict[str, Way], count: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each way, which take turns, for a number of rows."""
    x = np.random.default_rng(1).standard_normal((count, args.hidden))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(args.rounds + 1):
        for name, (program, weights, dtype) in ways.items():
            rows = jnp.asarray(x, dtype)
            start = time.perf_counter()
            jax.block_until_ready(program(rows, weights))
            if index:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Outputs and inputs of q, k, v, o, gate, up and down."""
    hidden, kv, inner = args.hidden, args.kv, args.inner
    return [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]


def _model(multiply: Product, outputs: Sequence[int]) -> Callable[[jax.Array, Any], jax.Array]:
    """Make a program with a decoder's products; in place of attention stands what costs nothing."""

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)

    def run(x: jax.Array, layers: Any) -> jax.Array:
        for weights in layers:
            q, k, v, o, gate, up, down = zip(weights, outputs, strict=True)
            h = norm(x)
            queries, mixed = multiply(h, *q), multiply(h, *k) + multiply(h, *v)
            x = x + multiply(queries + jnp.pad(mixed, ((0, 0), (0, queries.shape[1] - mixed.shape[1]))), *o)
            h = norm(x)
            x = x + multiply(jax.nn.silu(multiply(h, *gate)) * multiply(h, *up), *down)
        return x

    return run


def _by_blocks(name: str, activations: Activations) -> Product:
    def multiply(x: jax.Array, w: Tiles, n: int) -> jax.Array:
        product = blocks.product(x, w, name, n, dtype=x.dtype, activations=activations)
        if product is None:
            raise ValueError("this process has no CPU kernels: the log says why.")
        return product

    return multiply


def _draw_floats(dtype: str, random: np.random.Generator, n: int, k: int) -> jax.Array:
    return jnp.asarray(random.standard_normal((k, n)) * 0.02, dtype)


def _draw_blocks(name: str, random: np.random.Generator, n: int, k: int) -> Tiles:
    """Draw weights of a format straight in tiles."""
    arrays = {
        part: random.integers(0, 256, shape, np.uint8)
        if dtype == np.uint8
        else (0.005 * random.standard_normal(shape)).astype(dtype)
        for part, (shape, dtype) in shapes(name, n, k).items()
    }
    return Tiles(*(jnp.asarray(arrays[part]) if part in arrays else None for part in Tiles._fields))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32", help="numbers of rows, one after the other")
    formats = list(filter(blocks.takes, LAYOUTS))
    parser.add_argument("--formats", default=",".join(formats), help=f"of {', '.join(formats)}; '' for none")
    parser.add_argument("--activations", default="int8", help="of int8, int16 and float, with commas between")
    parser.add_argument("--floats", default="float32,bfloat16", help="dtypes of XLA's products; '' for none")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--hidden", type=int, default=576, help="its hidden size")
    parser.add_argument("--kv", type=int, default=192, help="outputs of keys, and of values")
    parser.add_argument("--inner", type=int, default=1536, help="size of its MLP")
    parser.add_argument("--rounds", type=int, default=15, help="times that each way runs")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
