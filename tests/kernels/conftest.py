"""Drawn caches with everything that must not be read filled with NaN or out of range."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest


@dataclass(frozen=True)
class Case:
    """Keyword arguments for both attentions, and the dense keys and values they stand for."""

    q: np.ndarray  # [T, Hq, D]
    k_pages: np.ndarray  # [N, P, Hk, D], NaN where no request has a token
    v_pages: np.ndarray
    page_table: np.ndarray  # [R, max_pages], N or far out of range past the used pages
    kv_len: np.ndarray  # [R]
    q_start: np.ndarray  # [R + 1]
    dense_k: list[np.ndarray] = field(default_factory=list)  # R times [kv_len, Hk, D]
    dense_v: list[np.ndarray] = field(default_factory=list)

    def behind(self, pages: int) -> "Case":
        """Return the case with its pools as those of a layer whose first page is `pages`, between others of NaN."""
        fill = [(pages, 2), *[(0, 0)] * 3]
        pools = {
            name: np.pad(getattr(self, name).astype(np.float32), fill, constant_values=np.nan).astype(self.q.dtype)
            for name in ("k_pages", "v_pages")
        }
        return replace(self, **pools)

    @property
    def cache(self) -> dict[str, np.ndarray]:
        """The arguments that prefill and decode share."""
        return {name: getattr(self, name) for name in ("k_pages", "v_pages", "page_table", "kv_len")}

    @property
    def prefill(self) -> dict[str, np.ndarray]:
        """The arguments of prefill."""
        return {"q": self.q, "q_start": self.q_start, **self.cache}


def _make_case(
    kv_len: list[int],
    chunk: list[int] | None = None,
    *,
    tokens: int | None = None,
    page_size: int = 8,
    max_pages: int = 12,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    dtype: str = "float32",
    seed: int = 0,
) -> Case:
    """Requests of the given lengths in a randomly permuted pool; `chunk` defaults to one row per request."""
    rng = np.random.default_rng(seed)
    chunk = [1] * len(kv_len) if chunk is None else chunk
    used = [math.ceil(n / page_size) for n in kv_len]
    num_pages = sum(used) + 3
    free = iter(rng.permutation(num_pages))
    k_pages, v_pages = (np.full((num_pages, page_size, heads[1], head_dim), np.nan, dtype) for _ in range(2))
    page_table = np.where(rng.random((len(kv_len), max_pages)) < 0.5, num_pages, 2**31 - 1).astype(np.int32)
    dense: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for r, length in enumerate(kv_len):
        page_table[r, : used[r]] = [next(free) for _ in range(used[r])]
        for pages, values in zip((k_pages, v_pages), dense, strict=True):
            values.append(rng.standard_normal((length, heads[1], head_dim)).astype(dtype))
            for t in range(length):
                pages[page_table[r, t // page_size], t % page_size] = values[r][t]
    q_start = np.cumsum([0, *chunk]).astype(np.int32)
    q = rng.standard_normal((q_start[-1] if tokens is None else tokens, heads[0], head_dim)).astype(dtype)
    return Case(q, k_pages, v_pages, page_table, np.array(kv_len, np.int32), q_start, *dense)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Builds a `Case` from lengths and chunks."""
    return _make_case
