"""Inputs and timing for `gpu_suite.py` and `tune.py`.

As in serving, inputs are random and pages scattered. Each call of a chain reads another layer's pages, so that KV comes
from memory and not from the cache. A chain feeds each output to the next call: calls follow each other on the device.
Calls are queued before the host waits, so the host's time per call does not count.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas.attention import paged_decode_attention, paged_prefill_attention
from twinmesh.kernels_pallas.work import ceil_div

MOST_DRAWN = 2**27  # random numbers at once, as drawing takes several times their memory

type Attention = Callable[..., Array]


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model, and the page size."""

    query: int  # query heads
    kv: int  # key/value heads
    dim: int  # head_dim
    page_size: int = 64

    @property
    def token_bytes(self) -> int:
        """Return the bytes of a token's keys and values in one layer, in 16 bits."""
        return 4 * self.kv * self.dim

    def __str__(self) -> str:
        """Return the name in a report."""
        return f"{self.query}/{self.kv}x{self.dim}p{self.page_size}"


@dataclass(frozen=True)
class Cached:
    """The pools of several layers as one flat pool, and requests that hold the same pages in each layer."""

    k_pages: Array  # [pages * layers, page_size, Hk, D]
    v_pages: Array  # [pages * layers, page_size, Hk, D]
    page_table: Array  # [R, max_pages], ids within a layer
    kv_len: Array  # [R]
    pages: int  # per layer
    layers: int

    def layer(self, index: int) -> tuple[Array, ...]:
        """Return the arguments of an attention in one of the layers."""
        table = self.page_table + (index % self.layers) * self.pages
        return self.k_pages, self.v_pages, table, self.kv_len


def cached(heads: Heads, lengths: Sequence[int], *, most_bytes: float, layers: int = 8, seed: int = 0) -> Cached:
    """Make requests of these lengths in bfloat16, with at most `layers` layers that fit into `most_bytes`."""
    size = heads.page_size
    used = [ceil_div(length, size) for length in lengths]
    pages = sum(used)
    layers = max(1, min(layers, int(most_bytes // (pages * size * heads.token_bytes))))
    table = np.zeros((len(lengths), max(used)), np.int32)
    ids = iter(np.random.default_rng(seed).permutation(pages))
    for row, count in enumerate(used):
        table[row, :count] = [next(ids) for _ in range(count)]
    k_pages, v_pages = (pool(heads, pages * layers, seed + i) for i in range(2))
    return Cached(k_pages, v_pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), pages, layers)


def pool(heads: Heads, pages: int, seed: int) -> Array:
    """Make a random pool [pages, page_size, Hk, D] bfloat16."""
    return noise((pages, heads.page_size, heads.kv, heads.dim), seed)


def noise(shape: tuple[int, ...], seed: int) -> Array:
    """Make random bfloat16; past MOST_DRAWN numbers, rows of the first axis repeat."""
    width = math.prod(shape[1:])
    rows = min(shape[0], max(1, MOST_DRAWN // width))
    numbers = 2 ** max(16, (rows * width - 1).bit_length())  # powers of two, so that few programs are compiled
    filled: Array = _shaped(_draw(jax.random.key(seed), numbers), shape, rows)
    return filled


@partial(jax.jit, static_argnums=1)
def _draw(key: Array, numbers: int) -> Array:
    drawn: Array = jax.random.normal(key, (numbers,), jnp.bfloat16)
    return drawn


@partial(jax.jit, static_argnums=(1, 2))
def _shaped(numbers: Array, shape: tuple[int, ...], rows: int) -> Array:
    block = numbers[: rows * math.prod(shape[1:])].reshape(rows, *shape[1:])
    return jnp.tile(block, (ceil_div(shape[0], rows), *[1] * (len(shape) - 1)))[: shape[0]]


def queries(heads: Heads, rows: int, seed: int = 2) -> Array:
    """Make random queries [rows, Hq, D] bfloat16."""
    return noise((rows, heads.query, heads.dim), seed)


def decode_chain(
    heads: Heads, cache: Cached, attention: Attention = paged_decode_attention, calls: int = 16
) -> Callable[[], tuple[Array, Array]]:
    """Make a chain of calls of attention, each fed by the one before; it returns the last output and the first."""
    return _chain(heads, cache, attention, (), len(cache.kv_len), calls)


def prefill_chain(
    heads: Heads, cache: Cached, chunks: Sequence[int], attention: Attention = paged_prefill_attention, calls: int = 4
) -> Callable[[], tuple[Array, Array]]:
    """Make a chain as `decode_chain` does, for the last `chunks` tokens of each request."""
    q_start = jnp.asarray(np.cumsum([0, *chunks]), jnp.int32)
    return _chain(heads, cache, attention, (q_start,), sum(chunks), calls)


def _chain(
    heads: Heads, cache: Cached, attention: Attention, more: tuple[Array, ...], rows: int, calls: int
) -> Callable[[], tuple[Array, Array]]:
    @jax.jit
    def chain(q: Array, arrays: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        own, outputs = Cached(*arrays, pages=cache.pages, layers=cache.layers), [q]
        for index in range(calls):
            outputs.append(attention(outputs[-1], *own.layer(index), *more, scale=heads.dim**-0.5))
        return outputs[-1], outputs[1]

    return partial(chain, queries(heads, rows), (cache.k_pages, cache.v_pages, cache.page_table, cache.kv_len))


def time_decode(heads: Heads, cache: Cached, attention: Attention = paged_decode_attention, calls: int = 16) -> float:
    """Measure the seconds of one layer's attention."""
    return seconds(decode_chain(heads, cache, attention, calls)) / calls


def time_prefill(
    heads: Heads, cache: Cached, chunks: Sequence[int], attention: Attention = paged_prefill_attention, calls: int = 4
) -> float:
    """Measure the seconds of one layer's attention, for the last `chunks` tokens of each request."""
    return seconds(prefill_chain(heads, cache, chunks, attention, calls)) / calls


def prefill_flops(heads: Heads, lengths: Sequence[int], chunks: Sequence[int]) -> float:
    """Count the FLOPs of both products over visible tokens."""
    visible = sum(
        chunk * (length - chunk) + chunk * (chunk + 1) / 2 for length, chunk in zip(lengths, chunks, strict=True)
    )
    return 4.0 * heads.query * heads.dim * visible


def seconds(call: Callable[..., Any], *arguments: Any, queued: int = 4, enough: float = 0.3) -> float:
    """Measure the seconds of one call, the median over rounds, after a call that compiles and one that warms up.

    A round queues `queued` calls and waits for all. There are 3 to 9 rounds, until they have taken `enough` seconds.
    """
    for _ in range(2):
        jax.block_until_ready(call(*arguments))
    times: list[float] = []
    while len(times) < 3 or (len(times) < 9 and sum(times) * queued < enough):
        start = time.perf_counter()
        outputs = [call(*arguments) for _ in range(queued)]
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - start) / queued)
    return float(np.median(times))


def attempt(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `find`, or {"failed": why}, so that later measurements still run."""
    try:
        return find()
    except Exception as error:  # a kernel does not compile, memory does not suffice, a package is missing
        return {"failed": reason(error)}


def reason(error: Exception) -> str:
    """Describe an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def copy_bandwidth(size: float = 4e9) -> float:
    """Measure the bytes per second, read and written, of a large copy."""
    x = noise((max(1, int(size) // 2**17), 2**16), 0)
    return 2 * x.nbytes / seconds(jax.jit(jnp.negative), x)


def matmul_rate(size: int = 8192) -> float:
    """Measure the FLOP/s of a large bfloat16 product."""
    a, b = (noise((size, size), i) for i in range(2))
    return 2.0 * size**3 / seconds(jax.jit(partial(jnp.matmul, preferred_element_type=jnp.bfloat16)), a, b)


def device(scale: float) -> Iterator[dict[str, str]]:
    """Describe the device and the software, for the head of a report."""
    first = jax.devices()[0]
    yield {
        "device": first.device_kind,
        "jax": jax.__version__,
        "platform": first.platform,
        "version": str(first.client.platform_version).replace("\n", " "),
    }
