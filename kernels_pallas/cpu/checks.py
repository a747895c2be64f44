"""What a kernel is asked before it is used: small products with known results. Without numba, for every start.

A check calls the kernel with awkward sizes, so that each way through its code runs once, and compares with NumPy.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from .blocks_check import check_blocks
from .frames import Call
from .kernels import PAGES
from .levels import Level

_ROWS, _DEPTH = 15, 99
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
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


class _Pages:
    """A pool of one kind: floats, or 8-bit numbers with a scale for each token and head. NaN where no token is."""

    def __init__(self, kind: str, shape: tuple[int, int, int, int]) -> None:
        self.kind, (count, page, heads, _) = kind, shape
        self.scales = np.full((count, heads, page) if kind in ("int8", "fp8") else (1,), np.nan, np.float32)
        empty = np.nan if kind != "int8" else 127
        self.numbers = np.full(shape, empty, np.dtype(_DTYPES[kind]))

    def write(self, page: int, offset: int, random: np.random.Generator) -> np.ndarray:
        """Fill a token's slot; return what it then stands for, [heads, head_dim] float32."""
        drawn = random.standard_normal(self.numbers.shape[2:], np.float32)
        if self.scales.ndim == 1:
            self.numbers[page, offset] = drawn.astype(self.numbers.dtype)
            return self.numbers[page, offset].astype(np.float32)
        scales = random.random(drawn.shape[:1], np.float32) / 30 + 0.02
        # Small enough for fp8's denormal numbers to be among them.
        wanted = (
            drawn / scales[:, None] if self.kind == "int8" else drawn * np.exp2(-random.integers(0, 9, drawn.shape))
        )
        self.numbers[page, offset] = np.clip(np.rint(wanted) if self.kind == "int8" else wanted, -127, 127)
        self.scales[page, :, offset] = scales
        return self.numbers[page, offset].astype(np.float32) * scales[:, None]


def check_decode(call: Call, level: Level, head_dim: int, keys: str, values: str) -> bool:
    """Say whether attention over a few pages is right: an empty row, several splits, and NaN where no token is."""
    random = np.random.default_rng(0)
    kv_heads, group, page, window, split = 2, 5, 48, 290, 256
    lengths, table = np.array([0, 1, 49, 330], np.int32), np.arange(28, dtype=np.int32).reshape(4, 7)[::-1].copy()
    q = random.standard_normal((4, kv_heads * group, head_dim), np.float32) / head_dim**0.5
    k, v = (_Pages(kind, (30, page, kv_heads, head_dim)) for kind in (keys, values))
    sink, first = np.linspace(-1, 1, kv_heads * group, dtype=np.float32), np.array([2], np.int32)
    expected = np.zeros_like(q)
    for row, length in enumerate(lengths):
        places = [(table[row, token // page] + 2, token % page) for token in range(max(length - window, 0), length)]
        if places:
            seen, held = (np.stack([pages.write(*place, random) for place in places]) for pages in (k, v))
            expected[row] = _attend(q[row], seen, held, sink)
    out, parts = np.full_like(q, np.nan), np.full((4, 3, kv_heads * group, head_dim + 2), np.nan, np.float32)
    arrays = [q, k.numbers, v.numbers, table, lengths, first, sink, k.scales, v.scales]
    call(arrays, [out, parts], [split, window])
    return bool(np.allclose(out, expected, atol=_TOLERANCE))


def check_prefill(call: Call, level: Level, head_dim: int, keys: str, values: str) -> bool:
    """Say whether attention of two chunks is right, with a window, a sink, and NaN where no token is."""
    random = np.random.default_rng(0)
    kv_heads, group, page, window, start = 2, 5, 48, 200, np.array([0, 3, 80], np.int32)
    lengths, table = np.array([3, 330], np.int32), np.arange(14, dtype=np.int32).reshape(2, 7)[::-1].copy()
    q = random.standard_normal((83, kv_heads * group, head_dim), np.float32) / head_dim**0.5
    k, v = (_Pages(kind, (16, page, kv_heads, head_dim)) for kind in (keys, values))
    sink, first = np.linspace(-1, 1, kv_heads * group, dtype=np.float32), np.array([2], np.int32)
    expected = np.zeros_like(q)
    for request, length in enumerate(lengths):
        places = [(table[request, token // page] + 2, token % page) for token in range(length)]
        all_keys, all_values = (np.stack([pages.write(*place, random) for place in places]) for pages in (k, v))
        for row in range(start[request], start[request + 1]):
            position = length - start[request + 1] + row
            seen = slice(max(position - window + 1, 0), position + 1)
            expected[row] = _attend(q[row], all_keys[seen], all_values[seen], sink)
    out = np.full_like(q, np.nan)
    arrays = [q, k.numbers, v.numbers, table, lengths, first, sink, start, k.scales, v.scales]
    call(arrays, [out], [window])
    return bool(np.allclose(out, expected, atol=_TOLERANCE))


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray) -> np.ndarray:
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    scores = np.concatenate([np.einsum("hd,thd->ht", q, k), sink[:, None]], axis=1).astype(np.float64)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ht,thd->hd", weights[:, :-1], v).astype(np.float32)


def _decode(keys: str, values: str) -> Callable[..., bool]:
    return lambda call, level, head_dim: check_decode(call, level, head_dim, keys, values)


def _prefill(keys: str, values: str) -> Callable[..., bool]:
    return lambda call, level, head_dim: check_prefill(call, level, head_dim, keys, values)


def _product(dtype: str, by_output: bool) -> Callable[..., bool]:
    return lambda call, level: check_product(call, level, dtype, by_output=by_output)


# By the kernel's name.
CHECKS: dict[str, Callable[..., bool]] = {
    f"{kind}_{dtype}": _product(dtype, kind == "score")
    for kind in ("product", "score")
    for dtype in ("float32", "bfloat16")
} | {f"decode_{name}": _decode(*kinds) for name, kinds in PAGES.items()}
CHECKS |= {f"prefill_{name}": _prefill(*kinds) for name, kinds in PAGES.items()}
CHECKS["blocks"] = check_blocks
