"""What a kernel is asked before it is used: small products with known results. Without numba, for every start.

A check calls the kernel with awkward sizes, so that each way through its code runs once, and compares with NumPy.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from .blocks_check import check_blocks
from .frames import Call
from .levels import Level
from .stacks_check import check_stack, check_stack_blocks

_ROWS, _DEPTH = 15, 99
_TOLERANCE = 1e-4  # of sums of 99 products of numbers below 1


def check_product(call: Call, level: Level, dtype: str, *, by_output: bool) -> bool:
    """Say whether a product of 15 rows is right, and each row's bits the same when it is alone."""
    random = np.random.default_rng(0)
    columns = 2 * 3 * level.lanes + level.lanes + 3
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    x = random.random((_ROWS, _DEPTH), np.float32).astype(kind)
    w = random.random((columns, _DEPTH) if by_output else (_DEPTH, columns), np.float32).astype(kind)
    if kind != np.float32 and not level.has_bf16:
        x = x.astype(np.float32)
    expected = np.matmul(x.astype(np.float64), (w.T if by_output else w).astype(np.float64))
    out, alone = (np.full((rows, columns), np.nan, np.float32) for rows in (_ROWS, 1))
    call([x, w], [out], [])
    call([x[-1:], w], [alone], [])
    return bool(np.allclose(out, expected, rtol=_TOLERANCE) and np.array_equal(alone[0], out[-1]))


def check_decode(call: Call, level: Level, head_dim: int, dtype: str) -> bool:
    """Say whether attention over a few pages is right: an empty row, several splits, and NaN where no token is."""
    random = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    kv_heads, group, page, window, split = 2, 5, 48, 290, 256
    lengths, table = np.array([0, 1, 49, 330], np.int32), np.arange(28, dtype=np.int32).reshape(4, 7)[::-1].copy()
    q = random.standard_normal((4, kv_heads * group, head_dim), np.float32) / head_dim**0.5
    k, v = (np.full((30, page, kv_heads, head_dim), np.nan, kind) for _ in range(2))
    sink, first = np.linspace(-1, 1, kv_heads * group, dtype=np.float32), np.array([2], np.int32)
    expected = np.zeros_like(q)
    for row, length in enumerate(lengths):
        keys, values = (random.standard_normal((length, kv_heads, head_dim), np.float32).astype(kind) for _ in range(2))
        for pages, new in ((k, keys), (v, values)):
            for token in range(max(length - window, 0), length):
                pages[table[row, token // page] + 2, token % page] = new[token]
        if length:
            seen = slice(max(length - window, 0), length)
            expected[row] = _attend(q[row], keys[seen].astype(np.float32), values[seen].astype(np.float32), sink)
    out, parts = np.full_like(q, np.nan), np.full((4, 3, kv_heads * group, head_dim + 2), np.nan, np.float32)
    call([q, k, v, table, lengths, first, sink], [out, parts], [split, window])
    return bool(np.allclose(out, expected, atol=_TOLERANCE))


def check_prefill(call: Call, level: Level, head_dim: int, dtype: str) -> bool:
    """Say whether attention of two chunks is right, with a window, a sink, and NaN where no token is."""
    random = np.random.default_rng(0)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    kv_heads, group, page, window, start = 2, 5, 48, 200, np.array([0, 3, 80], np.int32)
    lengths, table = np.array([3, 330], np.int32), np.arange(14, dtype=np.int32).reshape(2, 7)[::-1].copy()
    q = random.standard_normal((83, kv_heads * group, head_dim), np.float32) / head_dim**0.5
    k, v = (np.full((16, page, kv_heads, head_dim), np.nan, kind) for _ in range(2))
    sink, first = np.linspace(-1, 1, kv_heads * group, dtype=np.float32), np.array([2], np.int32)
    expected = np.zeros_like(q)
    for request, length in enumerate(lengths):
        keys, values = (random.standard_normal((length, kv_heads, head_dim), np.float32).astype(kind) for _ in range(2))
        for token in range(length):
            at = table[request, token // page] + 2, token % page
            k[at], v[at] = keys[token], values[token]
        for row in range(start[request], start[request + 1]):
            position = length - start[request + 1] + row
            seen = slice(max(position - window + 1, 0), position + 1)
            expected[row] = _attend(q[row], keys[seen].astype(np.float32), values[seen].astype(np.float32), sink)
    out = np.full_like(q, np.nan)
    call([q, k, v, table, lengths, first, sink, start], [out], [window])
    return bool(np.allclose(out, expected, atol=_TOLERANCE))


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray) -> np.ndarray:
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    scores = np.concatenate([np.einsum("hd,thd->ht", q, k), sink[:, None]], axis=1).astype(np.float64)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ht,thd->hd", weights[:, :-1], v).astype(np.float32)


def _decode(dtype: str) -> Callable[..., bool]:
    return lambda call, level, head_dim: check_decode(call, level, head_dim, dtype)


def _prefill(dtype: str) -> Callable[..., bool]:
    return lambda call, level, head_dim: check_prefill(call, level, head_dim, dtype)


def _product(dtype: str, by_output: bool) -> Callable[..., bool]:
    return lambda call, level: check_product(call, level, dtype, by_output=by_output)


def _stack(dtype: str) -> Callable[..., bool]:
    return lambda call, level: check_stack(call, level, dtype)


# By the kernel's name.
CHECKS: dict[str, Callable[..., bool]] = {
    f"{kind}_{dtype}": _product(dtype, kind == "score")
    for kind in ("product", "score")
    for dtype in ("float32", "bfloat16")
} | {f"decode_{dtype}": _decode(dtype) for dtype in ("float32", "bfloat16")}
CHECKS |= {f"prefill_{dtype}": _prefill(dtype) for dtype in ("float32", "bfloat16")}
CHECKS |= {f"stack_{dtype}": _stack(dtype) for dtype in ("float32", "bfloat16")}
CHECKS |= {"blocks": check_blocks, "stack_blocks": check_stack_blocks}
