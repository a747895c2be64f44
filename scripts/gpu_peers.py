"""Other people's attention on the same GPU at equal shapes, for `gpu_suite.py`: what is installed is measured.

FlashInfer and FlashAttention 3 read the very pages that ours reads, through DLPack; torch and cuDNN take contiguous
keys and values of the same sizes. Each peer is a function of (heads, cache, lengths, chunks) that gives seconds of one
call and the output, None where its inputs are its own. It raises where it is not installed or does not take the shapes;
`measured` makes that a reason in the report. Calls of torch run in a CUDA graph, so that its dispatch does not count.

Not here: our own kernels, and what a row of the report holds (`gpu_attention.py`).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.scripts.gpu_bench import Cached, Heads, pool, queries, reason, seconds
from twinmesh.scripts.gpu_facts import Facts

WORKSPACE = 512 * 2**20  # bytes of FlashInfer's buffer for partial sums
MOST_BYTES = 1.8e10  # of contiguous keys and values, beside the pages that ours reads


class Measured(NamedTuple):
    """Seconds of one call, and its output as [rows, Hq, D] where it read the inputs that ours reads."""

    seconds: float
    output: np.ndarray | None = None


type Peer = Callable[[Heads, Cached, Sequence[int], Sequence[int]], Measured]


def measured(peer: Peer, heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured | str:
    """What a peer measured, or the reason why it did not in one line."""
    try:
        return peer(heads, cache, lengths, chunks)
    except Exception as error:  # whatever a library that is not ours raises
        return reason(error)
    finally:
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps, JAX cannot have


def flashinfer_decode(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """`BatchDecodeWithPagedKVCacheWrapper` in NHD layout; on tensor cores where query heads share keys."""
    torch = _cuda_torch()
    import flashinfer

    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    shares = heads.query // heads.kv
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shares >= 4)
    pages = [_ints(x) for x in page_lists(heads.page_size, np.asarray(cache.page_table), lengths)]
    sizes = (heads.query, heads.kv, heads.dim, heads.page_size)
    wrapper.plan(*pages, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    q = _shared(queries(heads, len(lengths)))
    return _torch_measured([partial(wrapper.run, q, layer) for layer in _layers(cache)])


def flashinfer_prefill(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """`BatchPrefillWithPagedKVCacheWrapper`, causal from the bottom right."""
    torch = _cuda_torch()
    import flashinfer

    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    pages = [_ints(x) for x in page_lists(heads.page_size, np.asarray(cache.page_table), lengths)]
    sizes = (heads.query, heads.kv, heads.dim, heads.page_size)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(_starts(chunks), *pages, *sizes, causal=True, **types)
    q = _shared(queries(heads, sum(chunks)))
    return _torch_measured([partial(wrapper.run, q, layer) for layer in _layers(cache)])


def fa3_paged(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """FlashAttention 3 on the same pages; decode is a chunk of one row."""
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
    """FlashAttention 3 on contiguous keys and values, packed where there are several requests."""
    torch = _cuda_torch()
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    q = torch.randn(sum(chunks), heads.query, heads.dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths), heads.kv, heads.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if len(lengths) == 1:
        return Measured(_torch_measured([partial(flash_attn_func, q[None], k[None], v[None], causal=True)]).seconds)
    sizes = (_starts(chunks), _starts(lengths), max(chunks), max(lengths))
    return Measured(_torch_measured([partial(flash_attn_varlen_func, q, k, v, *sizes, causal=True)]).seconds)


def torch_flash(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """`scaled_dot_product_attention` with torch's flash attention, where all requests have one length."""
    return _torch_dense("FLASH_ATTENTION", heads, lengths, chunks)


def torch_cudnn(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """`scaled_dot_product_attention` with cuDNN, where all requests have one length."""
    return _torch_dense("CUDNN_ATTENTION", heads, lengths, chunks)


def _torch_dense(backend: str, heads: Heads, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    if len({*lengths}) > 1 or len({*chunks}) > 1:
        raise ValueError("torch's attention takes no lengths")
    if chunks[0] not in (1, lengths[0]):
        raise ValueError("torch's causal mask begins at the first key")
    _check_bytes(heads, lengths)
    torch = _cuda_torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (
        torch.randn(len(lengths), count, size, heads.dim, device="cuda", dtype=torch.bfloat16)
        for count, size in ((heads.query, chunks[0]), (heads.kv, lengths[0]), (heads.kv, lengths[0]))
    )
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        attend = torch.nn.functional.scaled_dot_product_attention
        call = partial(attend, q, k, v, is_causal=chunks[0] > 1, enable_gqa=True)
        return Measured(_torch_measured([call]).seconds)


def jax_cudnn(heads: Heads, cache: Cached, lengths: Sequence[int], chunks: Sequence[int]) -> Measured:
    """`jax.nn.dot_product_attention(implementation="cudnn")` on keys padded to the longest request."""
    if any(chunk not in (1, length) for chunk, length in zip(chunks, lengths, strict=True)):
        raise ValueError("cuDNN's causal mask begins at the first key")
    _check_bytes(heads, [max(lengths)] * len(lengths))
    padded = -(-max(lengths) // heads.page_size)  # pages of one request
    shape = (len(lengths), padded * heads.page_size, heads.kv, heads.dim)
    k, v = (pool(heads, len(lengths) * padded, seed).reshape(shape)[:, : max(lengths)] for seed in (3, 4))
    q = queries(heads, len(lengths) * max(chunks)).reshape(len(lengths), max(chunks), heads.query, heads.dim)
    options: Facts = {"is_causal": max(chunks) > 1, "implementation": "cudnn"}
    if len({*lengths}) > 1:
        options["key_value_seq_lengths"] = jnp.asarray(lengths, jnp.int32)
        options["query_seq_lengths"] = jnp.asarray(chunks, jnp.int32)

    def chain(q: Array, k: Array, v: Array) -> Array:
        for _ in range(4):
            q = jax.nn.dot_product_attention(q, k, v, **options)
        return q

    return Measured(seconds(jax.jit(chain), q, k, v) / 4)


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
    """Run FlashInfer once at small sizes: its first call compiles for a minute, and keeps what it compiled on disk."""
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


def _shared(array: Array) -> Any:
    """The same memory as a torch tensor."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def _layers(cache: Cached) -> list[tuple[Any, Any]]:
    """Each layer's pages of keys and of values."""
    pools = [_shared(x) for x in (cache.k_pages, cache.v_pages)]
    cuts = [slice(layer * cache.pages, (layer + 1) * cache.pages) for layer in range(cache.layers)]
    return [(pools[0][cut], pools[1][cut]) for cut in cuts]


def _starts(sizes: Sequence[int]) -> Any:
    return _ints(np.cumsum([0, *sizes]))


def _ints(values: np.ndarray) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int32, device="cuda")


def page_lists(size: int, table: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each request's pages begin in the list of all, the list, and the tokens in each request's last page."""
    used = [-(-length // size) for length in lengths]
    ids = np.concatenate([row[:count] for row, count in zip(table, used, strict=True)])
    tails = [length - (count - 1) * size for length, count in zip(lengths, used, strict=True)]
    return np.cumsum([0, *used]), ids, np.asarray(tails)


def _torch_measured(calls: Sequence[Callable[[], Any]]) -> Measured:
    """The output of the first call, and the median of replays of them all, or of plain runs where no graph is taken."""
    import torch

    output = calls[0]()
    repeated = list(calls) * -(-4 // len(calls))

    def run() -> None:
        for call in repeated:
            call()

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX has threads of its own
            run()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        replay = run
    times: list[float] = []
    replay()
    while len(times) < 3 or (len(times) < 9 and sum(times) * len(repeated) < 0.3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(repeated))
    return Measured(float(np.median(times)), output.float().cpu().numpy())
