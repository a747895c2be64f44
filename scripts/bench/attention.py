"""Times attention, append, products and sampling alone, for docs/performance.md. Run it on a quiet machine.

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
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sampling.logits_processors import empty_dense
from twinmesh.engine.sampling.request_rows import scalars_of
from twinmesh.engine.sampling.request_state import Scalars
from twinmesh.engine.sampling.sampler import sample
from twinmesh.kernels_pallas import append_kv, paged_decode_attention, paged_prefill_attention
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
    """Time decode at 1, 8 and 64 rows of 512 tokens, prefill of chunks after cached tokens, and the append."""
    pool = jnp.ones((POOL_PAGES, PAGE_SIZE, kv_heads, head_dim), dtype)
    pools = (pool, pool + 1)
    scale = head_dim**-0.5
    decode = jax.jit(lambda *a: paged_decode_attention(*a, scale=scale))
    for rows in (1, 8, 64):
        q = jnp.ones((rows, query_heads, head_dim), dtype)
        arrays = (q, *pools, page_tables(rows, 512), jnp.full(rows, 512, jnp.int32))
        report(f"decode {rows} x 512", partial(decode, *arrays))
    prefill = jax.jit(lambda *a: paged_prefill_attention(*a, scale=scale))
    for chunk, cached in ((512, 0), (512, 1536), (2048, 0)):
        q = jnp.ones((chunk, query_heads, head_dim), dtype)
        length = chunk + cached
        lengths = (jnp.array([length], jnp.int32), jnp.array([0, chunk], jnp.int32))
        chunk_arrays = (q, *pools, page_tables(1, length), *lengths)
        report(f"prefill {chunk} after {cached}", partial(prefill, *chunk_arrays))
    append = jax.jit(append_kv, donate_argnums=(0, 1))
    held = [pools]
    for tokens in (64, 512):
        new = jnp.ones((tokens, kv_heads, head_dim), dtype)
        slot = jnp.arange(tokens, dtype=jnp.int32) + PAGE_SIZE // 2

        def call(new: Array = new, slot: Array = slot) -> object:
            held[0] = append(*held[0], new, new, slot)
            return held[0]

        report(f"append {tokens}", call)


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


def bench_sampling(rows: int) -> None:
    """Time each way of sampling over a vocabulary of 49152."""
    logits = 4 * jax.random.normal(jax.random.key(0), (rows, VOCABULARY))
    position = jnp.arange(rows, dtype=jnp.int32)
    dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty_dense(rows, VOCABULARY))
    step = jax.jit(sample)
    regimes = {
        "greedy": SamplingPlan(temperature=0, seed=1),
        "temperature": SamplingPlan(temperature=1, seed=1),
        "top_p, bounded": SamplingPlan(temperature=0.5, seed=1, top_p=0.9),
        "sorted": SamplingPlan(temperature=5, seed=1, top_p=0.99),
    }
    for name, plan in regimes.items():
        scalars = Scalars(*(jnp.tile(x, (rows, 1)) for x in scalars_of(plan, 0)))
        report(f"sample {rows}, {name}", partial(step, logits, scalars, dense, position, position), rounds=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description="Time attention, append, products and sampling on this machine.")
    parser.add_argument("--heads", default="9,3", help="query heads, key/value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    query_heads, kv_heads = (int(x) for x in options.heads.split(","))
    print(f"{jax.devices()[0].device_kind}, {options.dtype:20} {'best ms':>10} {'median':>8}")
    bench_attention(query_heads, kv_heads, options.head_dim, options.dtype)
    bench_products(options.dtype)
    bench_sampling(64)
    return 0


if __name__ == "__main__":
    sys.exit(main())
