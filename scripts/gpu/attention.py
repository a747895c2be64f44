"""Measures attention alone, for `gpu_suite.py`: ours and every installed peer, at equal shapes in the same process.

A row holds our time, the share of a ceiling of the same run that it reaches, and for each peer its time and `ratio`,
the peer's time over ours (above 1: ours is faster), or null and the reason. If a peer read the same pages, `difference`
is the relative distance of its output from ours. The most important rows come first, as a section may be cut short.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas.attention import append_kv
from twinmesh.kernels_pallas.work import ceil_div
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.peers import DECODE, PREFILL, Peer, build, measured
from twinmesh.scripts.gpu.timing import (
    Cached,
    Heads,
    attempt,
    cached,
    copy_bandwidth,
    decode_chain,
    matmul_rate,
    pool,
    prefill_chain,
    prefill_flops,
    seconds,
)

DECODES = ((32, 8192), (128, 1024), (32, 1024), (128, 8192), (32, 32768), (128, 32768))  # batch, context
HEADS = (Heads(32, 8, 128), Heads(64, 8, 64))
APPENDS = (1, 32, 128, 8192)  # tokens
DECODE_CALLS, PREFILL_CALLS, APPEND_CALLS = 16, 4, 16  # in one program
MOST_BYTES = 2e10  # of one row's pages, unless a single layer takes more


def ceilings(scale: float) -> Iterator[Facts]:
    """Measure the device's ceilings: the rates of a large copy and of a large product."""
    yield device_rates(scale)


def device_rates(scale: float) -> Facts:
    """Measure a copy and a large product, in the units of the report."""
    return {"copy_tb_s": copy_bandwidth(4e9 * scale) / 1e12, "matmul_tflop_s": matmul_rate(int(8192 * scale)) / 1e12}


def build_peers(scale: float) -> Iterator[Facts]:
    """Have FlashInfer compile, while the checks run."""
    yield build(HEADS, cached)


def decode(scale: float) -> Iterator[Facts]:
    """Measure decode as bandwidth of the KV it reads, compared with a copy's in the same process; then the append."""
    facts = device_rates(scale)
    yield facts
    failed = 0
    for rows, context in DECODES if scale > 0.1 else DECODES[:1]:
        for heads in HEADS:
            batch, length = max(2, int(rows * min(scale, 1))), max(2, int(context * scale))
            ragged = np.random.default_rng(0).integers(1, 2 * length, batch).tolist()
            for kind, lengths in (("even", [length] * batch), ("ragged", ragged)):
                row = attempt(partial(decode_row, heads, lengths, 1e12 * facts["copy_tb_s"]))
                failed += "failed" in row
                yield {"rows": {f"{heads} {rows}x{context} {kind}": row}}
    appends = {str(tokens): attempt(partial(append_row, HEADS[0], tokens, scale)) for tokens in APPENDS}
    yield {"append": appends}
    yield _rows_failed(failed + sum("failed" in row for row in appends.values()))


def decode_row(heads: Heads, lengths: Sequence[int], copy: float, peers: Mapping[str, Peer] = DECODE) -> Facts:
    """Measure decode of one batch; `copy` in bytes per second."""
    cache = cached(heads, lengths, most_bytes=MOST_BYTES)
    run = decode_chain(heads, cache, calls=DECODE_CALLS)
    taken, ours = seconds(run) / DECODE_CALLS, np.asarray(run()[1], np.float32)
    rate = sum(lengths) * heads.token_bytes / taken
    beside = _beside(peers, heads, cache, lengths, [1] * len(lengths), taken, ours)
    return {"us": 1e6 * taken, "tb_s": rate / 1e12, "of_copy": rate / copy, "peers": beside}


def prefill(scale: float) -> Iterator[Facts]:
    """Measure prefill in FLOP/s over visible tokens; other rows than the 8k prompt's also as a share of its rate."""
    facts = device_rates(scale)
    yield facts
    dense: dict[Heads, float] = {}
    failed = 0
    shapes = (
        ("8k", (8192,), (8192,)),
        ("16k", (16384,), (16384,)),
        ("2k of 18k", (18432,), (2048,)),
        ("ragged", (4096, 1000, 6000, 300), (4096, 1000, 2000, 300)),
    )
    for name, lengths, chunks in shapes:
        for heads in HEADS:
            length, chunk = ([max(1, int(scale * n)) for n in each] for each in (lengths, chunks))
            row = attempt(partial(prefill_row, heads, length, chunk, 1e12 * facts["matmul_tflop_s"]))
            failed += "failed" in row
            if name == "8k" and "tflop_s" in row:
                dense[heads] = row["tflop_s"]
            elif heads in dense and "tflop_s" in row:
                row["of_dense_rate"] = row["tflop_s"] / dense[heads]
            yield {"rows": {f"{heads} {name}": row}}
    yield _rows_failed(failed)


def _rows_failed(count: int) -> Facts:
    return {"failed": f"{count} rows have no figures; each says why."} if count else {}


def prefill_row(
    heads: Heads, lengths: Sequence[int], chunks: Sequence[int], matmul: float, peers: Mapping[str, Peer] = PREFILL
) -> Facts:
    """Measure one step of prefill, for the last `chunks` tokens of each request; `matmul` in FLOP per second."""
    cache = cached(heads, lengths, most_bytes=MOST_BYTES / 2)
    run = prefill_chain(heads, cache, chunks, calls=PREFILL_CALLS)
    taken, ours = seconds(run) / PREFILL_CALLS, np.asarray(run()[1], np.float32)
    rate = prefill_flops(heads, lengths, chunks) / taken
    beside = _beside(peers, heads, cache, lengths, chunks, taken, ours)
    return {"us": 1e6 * taken, "tflop_s": rate / 1e12, "of_matmul": rate / matmul, "peers": beside}


def _beside(
    peers: Mapping[str, Peer],
    heads: Heads,
    cache: Cached,
    lengths: Sequence[int],
    chunks: Sequence[int],
    taken: float,
    ours: np.ndarray,
) -> Facts:
    """Measure each peer: its time and the ratio to ours, or null with the reason."""
    facts: Facts = {}
    for name, peer in peers.items():
        found = measured(peer, heads, cache, lengths, chunks)
        if isinstance(found, str):
            facts[name] = {"us": None, "ratio": None, "reason": found}
            continue
        facts[name] = {"us": 1e6 * found.seconds, "ratio": found.seconds / taken}
        if found.output is not None and found.output.shape == ours.shape:
            distance = np.linalg.norm(found.output - ours) / np.linalg.norm(ours)
            facts[name]["difference"] = float(distance)
    ratios = [row["ratio"] for row in facts.values() if row["ratio"] is not None]
    return facts | {"best_ratio": min(ratios, default=None)}


def append_row(heads: Heads, tokens: int, scale: float) -> Facts:
    """Measure XLA's scatter of new keys and values into donated pools of 1 GB each."""
    tokens = max(1, int(tokens * scale)) if tokens > 128 else tokens
    pages = max(ceil_div(tokens, heads.page_size), int(1e9 * scale / (heads.page_size * heads.token_bytes / 2)))
    order = np.random.default_rng(0).permutation(pages * heads.page_size)
    slots = [np.roll(order, -i * tokens)[:tokens] for i in range(APPEND_CALLS)]  # no two calls in a row do the same
    k, v = (
        pool(heads, ceil_div(tokens, heads.page_size), i).reshape(-1, heads.kv, heads.dim)[:tokens] for i in range(2)
    )
    held = [pool(heads, pages, 2), pool(heads, pages, 3)]

    @partial(jax.jit, donate_argnums=(0, 1))
    def appends(k_pages: Array, v_pages: Array, k: Array, v: Array, slots: Array) -> tuple[Array, Array, Array]:
        filled: tuple[Any, Any] = k_pages, v_pages
        for slot in slots:
            filled = append_kv(filled[0], filled[1], k, v, slot)
        return *filled, filled[0][0, 0, 0, 0]

    def call(*new: Array) -> Array:
        written: Array  # the only result to wait for, as the next call donates the pools
        *held[:], written = appends(*held, *new)
        return written

    taken = seconds(call, k, v, jnp.asarray(np.stack(slots), jnp.int32)) / APPEND_CALLS
    return {"us": 1e6 * taken, "bytes": tokens * heads.token_bytes}
