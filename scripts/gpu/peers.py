"""Measures other libraries' attention on the same GPU at equal shapes, for `gpu_suite.py`, if they are installed.

FlashInfer and FlashAttention 3 read the same pages as ours, through DLPack; torch and cuDNN take contiguous keys and
values of the same sizes. Each peer is a function of (heads, cache, lengths, chunks) that returns the seconds of one
call and the output, or None if it has inputs of its own. A peer that is not installed or does not support the shapes
raises, which `measured` converts to a reason in the report. Torch's calls run in a CUDA graph, so that its dispatch
does not count.

Not here: our own kernels, and the contents of the report's rows (`attention.py`).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas.work import ceil_div
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import Cached, Heads, pool, queries, reason, seconds

WORKSPACE = 512 * 2**20  # bytes of FlashInfer's buffer for partial sums
FRESH_BYTES, MOST_SETS = 3e8, 20  # of keys and values read in turn, several times the cache of 50 MB
REPLAYS = 4  # of a graph between two events, as launching one takes half as long as a short call
MOST_BYTES = 1.8e10  # of contiguous keys and values, beside the pages that ours reads


class Measured(NamedTuple):
    """The result of a peer."""

    seconds: float  # of one call
    output: np.ndarray | None = None  # [rows, Hq, D]; None if its inputs are not those of ours


type Peer = Callable[[Heads, Cached, Sequence[int], Sequence[int]], Measured]


def measured(peer: Peer, heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured | str:
    """Measure a peer; if that fails, return the reason in one line."""
    try:
        return peer(heads, cache, lengths, chunks)
    except Exception as error:  # another library may raise anything
        return reason(error)
    finally:
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # JAX cannot allocate memory that torch keeps


def flashinfer_decode(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure `BatchDecodeWithPagedKVCacheWrapper` in NHD layout; on tensor cores where query heads share keys."""
    workspace = _workspace()
    import flashinfer

    on_tensor_cores = heads.query // heads.kv >= 4
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=on_tensor_cores)
    return _flashinfer(wrapper.plan, wrapper.run, heads, cache, lengths, len(lengths))


def flashinfer_prefill(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure `BatchPrefillWithPagedKVCacheWrapper`, causal from the bottom right."""
    workspace = _workspace()
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    plan = partial(wrapper.plan, _starts(chunks), causal=True)
    return _flashinfer(plan, wrapper.run, heads, cache, lengths, sum(chunks))


def _workspace() -> Any:
    torch = _cuda_torch()
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")


def _flashinfer(
    plan: Callable[..., Any],
    run: Callable[..., Any],
    heads: Heads,
    cache: Cached,
    lengths: Sequence[int],
    rows: int,
) -> Measured:
    """Plan for these pages, and measure runs on `rows` queries in each layer."""
    import torch

    pages = [_ints(x) for x in page_lists(heads.page_size, np.asarray(cache.page_table), lengths)]
    sizes = (heads.query, heads.kv, heads.dim, heads.page_size)
    plan(*pages, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    q = _shared(queries(heads, rows))
    return _torch_measured([partial(run, q, layer) for layer in _layers(cache)])


def fa3_paged(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure FlashAttention 3 on the same pages; decode is a chunk of one row."""
    torch = _cuda_torch()
    from flash_attn_interface import flash_attn_with_kvcache

    q, starts = _shared(queries(heads, sum(chunks))), _starts(chunks)
    k_pages, v_pages, tables, kv_len = (_shared(x) for x in cache.layer(0))
    calls = [
        partial(
            flash_attn_with_kvcache, q, k_pages, v_pages, cache_seqlens=kv_len,
            page_table=(tables + layer * cache.pages).to(torch.int32).contiguous(), cu_seqlens_q=starts,
            max_seqlen_q=max(chunks), causal=True,
        )
        for layer in range(cache.layers)
    ]  # fmt: skip
    return _torch_measured(calls)


def fa3_dense(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure FlashAttention 3 on contiguous keys and values, packed if there are several requests."""
    torch = _cuda_torch()
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    q = torch.randn(sum(chunks), heads.query, heads.dim, device="cuda", dtype=torch.bfloat16)
    shape = (sets(heads, lengths), 2, sum(lengths), heads.kv, heads.dim)
    kvs = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if len(lengths) == 1:
        one = [partial(flash_attn_func, q[None], k[None], v[None], causal=True) for k, v in kvs]
        return Measured(_torch_seconds(one))
    sizes = (_starts(chunks), _starts(lengths), max(chunks), max(lengths))
    return Measured(_torch_seconds([partial(flash_attn_varlen_func, q, k, v, *sizes, causal=True) for k, v in kvs]))


def torch_flash(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure `scaled_dot_product_attention` with torch's flash attention, for requests of one length."""
    return _torch_dense("FLASH_ATTENTION", heads, lengths, chunks)


def torch_cudnn(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure `scaled_dot_product_attention` with cuDNN, for requests of one length."""
    return _torch_dense("CUDNN_ATTENTION", heads, lengths, chunks)


def _torch_dense(backend: str, heads: Heads, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    if len({*lengths}) > 1 or len({*chunks}) > 1:
        raise ValueError("torch's attention takes no lengths")
    if chunks[0] not in (1, lengths[0]):
        raise ValueError("torch's causal mask begins at the first key")
    _check_bytes(heads, lengths)
    torch = _cuda_torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = len(lengths)
    q = torch.randn(rows, heads.query, chunks[0], heads.dim, device="cuda", dtype=torch.bfloat16)
    shape = (sets(heads, lengths), 2, rows, heads.kv, lengths[0], heads.dim)
    kvs = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        attend = torch.nn.functional.scaled_dot_product_attention
        return Measured(
            _torch_seconds([partial(attend, q, k, v, is_causal=chunks[0] > 1, enable_gqa=True) for k, v in kvs])
        )


def jax_cudnn(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """Measure `jax.nn.dot_product_attention(implementation="cudnn")` on keys padded to the longest request."""
    if any(chunk not in (1, length) for chunk, length in zip(chunks, lengths, strict=True)):
        raise ValueError("cuDNN's causal mask begins at the first key")
    _check_bytes(heads, [max(lengths)] * len(lengths))
    padded = ceil_div(max(lengths), heads.page_size)  # pages of one request
    shape = (len(lengths), padded * heads.page_size, heads.kv, heads.dim)
    kvs = [
        tuple(pool(heads, len(lengths) * padded, 2 * i + seed).reshape(shape)[:, : max(lengths)] for seed in (3, 4))
        for i in range(sets(heads, [max(lengths)] * len(lengths)))
    ]
    calls = max(4, len(kvs))
    q = queries(heads, len(lengths) * max(chunks)).reshape(len(lengths), max(chunks), heads.query, heads.dim)
    options: Facts = {"is_causal": max(chunks) > 1, "implementation": "cudnn"}
    if len({*lengths}) > 1:
        options["key_value_seq_lengths"] = jnp.asarray(lengths, jnp.int32)
        options["query_seq_lengths"] = jnp.asarray(chunks, jnp.int32)

    def chain(q: Array, kvs: list[tuple[Array, ...]]) -> Array:
        for i in range(calls):
            q = jax.nn.dot_product_attention(q, *kvs[i % len(kvs)], **options)
        return q

    return Measured(seconds(jax.jit(chain), q, kvs) / calls)


DECODE: Mapping[str, Peer] = {
    "flashinfer": flashinfer_decode,
    "fa3_paged": fa3_paged,
    "torch_flash": torch_flash,
    "torch_cudnn": torch_cudnn,
    "jax_cudnn": jax_cudnn,
}
PREFILL: Mapping[str, Peer] = {
    "fa3": fa3_dense,
    "fa3_paged": fa3_paged,
    "flashinfer": flashinfer_prefill,
    "torch_flash": torch_flash,
    "torch_cudnn": torch_cudnn,
    "jax_cudnn": jax_cudnn,
}


def build(heads: Sequence[Heads], cached: Callable[..., Cached]) -> Facts:
    """Run FlashInfer once at small sizes: its first call compiles for a minute, and caches the result on disk."""
    found: Facts = {}
    for each in heads:
        for name, peer, chunk in (("decode", flashinfer_decode, 1), ("prefill", flashinfer_prefill, 128)):
            result = measured(peer, each, cached(each, [128] * 2, most_bytes=1), [128] * 2, [chunk] * 2)
            found[f"{name} {each}"] = result if isinstance(result, str) else "built"
    return found


def _cuda_torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return torch


def _check_bytes(heads: Heads, lengths: Sequence[int]) -> None:
    if sum(lengths) * heads.token_bytes > MOST_BYTES:
        raise ValueError(f"contiguous keys and values would take more than {MOST_BYTES / 1e9:.0f} GB")


def sets(heads: Heads, lengths: Sequence[int]) -> int:
    """Count the sets of contiguous keys and values to read in turn, so that they come from memory and not the cache."""
    return min(MOST_SETS, max(1, math.ceil(FRESH_BYTES / (sum(lengths) * heads.token_bytes))))


def _shared(array: Array) -> Any:
    """Return the same memory as a torch tensor."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def _layers(cache: Cached) -> list[tuple[Any, Any]]:
    """List each layer's pages of keys and of values."""
    pools = [_shared(x) for x in (cache.k_pages, cache.v_pages)]
    cuts = [slice(layer * cache.pages, (layer + 1) * cache.pages) for layer in range(cache.layers)]
    return [(pools[0][cut], pools[1][cut]) for cut in cuts]


def _starts(sizes: Sequence[int]) -> Any:
    return _ints(np.cumsum([0, *sizes]))


def _ints(values: np.ndarray) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int32, device="cuda")


def page_lists(size: int, table: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List all requests' page ids: each request's start in the list, the list, and the tokens in each last page."""
    used = [ceil_div(length, size) for length in lengths]
    ids = np.concatenate([row[:count] for row, count in zip(table, used, strict=True)])
    tails = [length - (count - 1) * size for length, count in zip(lengths, used, strict=True)]
    return np.cumsum([0, *used]), ids, np.asarray(tails)


def _torch_measured(calls: Sequence[Callable[[], Any]]) -> Measured:
    """Measure the seconds of a call, and return the first one's output, the first of several in some versions."""
    output = calls[0]()
    output = output[0] if isinstance(output, tuple) else output
    return Measured(_torch_seconds(calls), output.float().cpu().numpy())


def _torch_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Measure the time of a call, the median over rounds; of plain runs if no graph can be captured."""
    import torch

    repeated = list(calls) * ceil_div(4, len(calls))
    replay = _torch_graph(repeated)
    times: list[float] = []
    replay()
    count = REPLAYS * len(repeated)
    while len(times) < 3 or (len(times) < 9 and sum(times) * count < 0.3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return float(np.median(times))


def _torch_graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """Capture all calls in a CUDA graph; if a library cannot be captured, run them one after the other."""
    import torch

    def run() -> None:
        for call in calls:
            call()

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads may call CUDA meanwhile
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    replay: Callable[[], None] = graph.replay
    return replay
