"""A step of its own for research: prompts through the model, and hidden states out, beside what the engine serves.

It is the engine's own forward pass, with its parameters, products and paged attention, over a small pool of pages that
is not the engine's: nothing that is served is touched, and memory does not grow with the number of prompts. Keys and
values are stored in the model's dtype here, also where the engine's pages have 8 bits. Nothing is sampled.
`compile_program.py` compiles it for a size when somebody asks for that; `states_runner.py` lays prompts out.

Shapes: T packed tokens, R rows, P pages of the pool, which every group of layers has, and of which a row may have all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...models.decoder import Decoder
from .kv_cache import KVCache, abstract_pages
from .mesh_plan import MeshPlan
from .paged_attention import PagedAttention, PrefillRows, StepRows

# The first columns of `rows`; the row's page table follows.
LENGTH, KV_LEN, TABLE = 0, 1, 2


def states_step(
    decoder: Decoder,
    mesh: Mesh,
    after: tuple[int, ...],
    kv: tuple[KVCache, ...],
    tokens: jax.Array,
    rows: jax.Array,
) -> tuple[tuple[KVCache, ...], list[jax.Array]]:
    """Append the chunks' keys and values, attend, and keep the hidden states after some layers.

    Args:
        decoder: the model.
        mesh: runs the step.
        after: as for `Decoder.states`.
        kv: the pool, donated.
        tokens: [T] int32, the rows' chunks one after the other.
        rows: [R, TABLE + P] int32: tokens of the chunk, cached tokens with it, and pages; padding has lengths of 0.

    Returns:
        The pool, and hidden states [T, E] for each of `after`.
    """
    length, kv_len, table = rows[:, LENGTH], rows[:, KV_LEN], rows[:, TABLE:]
    q_start = jnp.pad(jnp.cumsum(length, dtype=jnp.int32), (1, 0))
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(q_start, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row - 1, rows.shape[0] - 1)
    is_token = index < q_start[-1]
    positions = jnp.where(is_token, kv_len[row] - (q_start[row + 1] - index), 0)
    slots = tuple(_slots(pool, table[row], positions, is_token) for pool in kv)
    chunks = PrefillRows((table,) * len(kv), kv_len, q_start)
    attend, step_rows = PagedAttention(mesh, decoder.config), StepRows(slots, None, chunks)
    states, kv = decoder.states(after, tokens, positions, attend, kv, step_rows, is_token)
    return kv, states


def _slots(pool: KVCache, tables: jax.Array, positions: jax.Array, is_token: jax.Array) -> jax.Array:
    """Find where each token's keys and values are written, [T]; past the pool for padding. `tables` is [T, P]."""
    layers, pages, page_size, *_ = pool.k.shape
    page = jnp.take_along_axis(tables, (positions // page_size)[:, None], axis=1)[:, 0]
    return jnp.where(is_token, page * page_size + positions % page_size, layers * pages * page_size)


def abstract_pool(plan: MeshPlan, pages: int) -> tuple[KVCache, ...]:
    """Describe a pool of so many pages for every group of layers, by shapes and shardings."""

    def of(pool: KVCache) -> KVCache:
        layers, _, *rest = pool.k.shape
        shape: Any = (layers, pages, *rest)
        return KVCache(*(abstract_pages(shape, plan.dtype, plan.mesh) for _ in range(2)))

    return tuple(map(of, plan.state.kv))
