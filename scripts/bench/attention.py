"""Times attention, append and products alone, for docs/performance.md. Run it on a quiet machine.

    python scripts/bench/attention.py [--heads 9,3] [--head-dim 64] [--dtype float32]

Prints the best and the median of 20 calls in milliseconds. One layer per call; pages scattered over a pool of several
hundred MB, so that the cache comes from memory as in serving.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas import xla
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import append_kv, paged_decode_attention, paged_prefill_attention
from twinmesh.kernels_pallas.work import ceil_div

PAGE_SIZE = 64
POOL_PAGES = 4096
MAX_PAGES = 32
VOCABULARY = 49152
LAYERS = 30


def report(name: str, call: Callable[[], object], rounds: int = 20) -> None:
    """Print the best and the median time of a call, in milliseconds, not counting a first call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name:32} {min(times):8.2f} {np.median(times):8.2f}", flush=True)


def page_tables(rows: int, length: int) -> Array:
    """Make page tables of random distinct pages for rows of one length, [rows, MAX_PAGES] int32."""
    used = ceil_div(length, PAGE_SIZE)
    table = np.full((rows, MAX_PAGES), POOL_PAGES, np.int32)
    table[:, :used] = np.random.default_rng(0).permutation(POOL_PAGES)[: rows * used].reshape(rows, used)
    return jnp.asarray(table)


def bench_attention(query_heads: int, kv_heads: int, head_dim: int, dtype: str) -> None:
    """Time decode at 1, 8 and 64 rows of 512 tokens, prefill, and the append."""
    pool = jnp.ones((POOL_PAGES, PAGE_SIZE, kv_heads, head_dim), dtype)
    pools = (pool, pool + 1)
    scale = head_dim**-0.5
    decode = jax.jit(lambda *a: paged_decode_attention(*a, scale=scale))
    for rows in (1, 8, 64):
        q = jnp.ones((rows, query_heads, head_dim), dtype)
        arrays = (q, *pools, page_tables(rows, 512), jnp.full(rows, 512, jnp.int32))
        report(f"decode {rows} x 512", partial(decode, *arrays))
    bench_prefill(query_heads, pools)
    append = jax.jit(append_kv, donate_argnums=(0, 1))
    held = [pools]
    for tokens in (64, 512):
        new = jnp.ones((tokens, kv_heads, head_dim), dtype)
        slot = jnp.arange(tokens, dtype=jnp.int32) + PAGE_SIZE // 2

        def call(new: Array = new, slot: Array = slot) -> object:
            held[0] = append(*held[0], new, new, slot)
            return held[0]

        report(f"append {tokens}", call)


def bench_prefill(query_heads: int, pools: tuple[Array, Array]) -> None:
    """Time chunks of prompts after cached tokens, by the kernel that programs get here and by XLA."""
    options = AttentionOptions(pools[0].shape[-1] ** -0.5)

    def by_xla(q: Array, k: Array, v: Array, table: Array, lengths: Array, starts: Array) -> Array:
        return xla.paged_prefill_attention(q, PagedKV(k, v, table, lengths), starts, options)

    ways = {"": jax.jit(partial(paged_prefill_attention, scale=options.scale)), " by XLA": jax.jit(by_xla)}
    for rows, chunk, cached in ((1, 64, 0), (8, 64, 0), (1, 512, 0), (4, 128, 384), (1, 512, 1536), (1, 2048, 0)):
        q = jnp.ones((rows * chunk, query_heads, pools[0].shape[-1]), pools[0].dtype)
        length, starts = chunk + cached, chunk * jnp.arange(rows + 1, dtype=jnp.int32)
        arrays = (q, *pools, page_tables(rows, length), jnp.full(rows, length, jnp.int32), starts)
        for name, way in ways.items():
            report(f"prefill {rows} x {chunk} after {cached}{name}", partial(way, *arrays))


def bench_products(dtype: str) -> None:
    """Time a decode step's products: of all 30 layers one after the other, and of the head."""
    shapes = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
    layers = [[jnp.full(shape, 1e-2, dtype) + i for shape in shapes] for i in range(LAYERS)]
    head = jnp.full((VOCABULARY, 576), 1e-2, dtype)

    @jax.jit
    def chain(x: Array, layers: list[list[Array]]) -> Array:
        for q, k, v, o, gate, up, down in layers:
            attended = x @ q + jnp.tile(x @ k + x @ v, (1, 3))
            x = x + attended @ o
            x = x + ((x @ gate) * (x @ up)) @ down
        return x

    score = jax.jit(lambda x, w: jnp.einsum("re,ve->rv", x, w, preferred_element_type=jnp.float32))
    for rows in (1, 4, 8, 64):
        x = jnp.ones((rows, 576), dtype)
        report(f"products of {LAYERS} layers x {rows}", partial(chain, x, layers))
        report(f"head x {rows}", partial(score, x, head))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Time attention, append and products on this machine.")
    parser.add_argument("--heads", default="9,3", help="query heads, key/value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    query_heads, kv_heads = (int(x) for x in options.heads.split(","))
    print(f"{jax.devices()[0].device_kind}, {options.dtype:20} {'best ms':>10} {'median':>8}")
    bench_attention(query_heads, kv_heads, options.head_dim, options.dtype)
    bench_products(options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
