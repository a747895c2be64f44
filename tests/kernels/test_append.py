"""append_kv against the oracle, and that a chain of layers updates one donated pool in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.kernels_pallas import reference
from twinmesh.kernels_pallas.attention import append_kv, paged_decode_attention, paged_prefill_attention

LAYERS, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = 4, 256, 16, 2, 32


def test_append_matches_oracle_and_padding_writes_nothing():
    rng = np.random.default_rng(0)
    k_pages, v_pages = rng.standard_normal((2, 6, 4, 2, 3), np.float32)
    k, v = rng.standard_normal((2, 8, 2, 3), np.float32)
    slot = np.array([23, 24, 0, 25, 5, 2**31 - 1, 11, 4], np.int32)
    want = reference.append_kv(jnp.asarray(k_pages), jnp.asarray(v_pages), k, v, slot)
    got = jax.jit(append_kv)(k_pages, v_pages, k, v, slot)
    np.testing.assert_array_equal(got, want)
    untouched = np.delete(np.arange(24), slot[slot < 24])
    np.testing.assert_array_equal(got[0].reshape(24, 2, 3)[untouched], k_pages.reshape(24, 2, 3)[untouched])


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("first", [0, 1, 4, 5, 6])
def test_append_adds_the_first_page_and_padding_still_writes_nothing(first, as_array):
    rng = np.random.default_rng(first)
    k_pages, v_pages = rng.standard_normal((2, 6, 4, 2, 3), np.float32)
    k, v = rng.standard_normal((2, 7, 2, 3), np.float32)
    slot = np.array([3, 24, 0, 7, 2**31 - 1, 25, 4], np.int32)
    given = jnp.int32(first) if as_array else first
    got = jax.jit(append_kv)(k_pages, v_pages, k, v, slot, first_page=given)
    for pages, new, pool in zip(got, (k, v), (k_pages, v_pages), strict=True):
        want = pool.reshape(24, 2, 3).copy()
        for at, row in zip(slot.tolist(), new, strict=True):
            if at + 4 * first < 24:
                want[at + 4 * first] = row
        np.testing.assert_array_equal(pages.reshape(24, 2, 3), want)


def test_only_padding_changes_nothing():
    pages = jnp.ones((2, 4, 1, 2))
    new = jnp.zeros((5, 1, 2))
    for out in append_kv(pages, pages, new, new, jnp.full(5, 8, jnp.int32)):
        np.testing.assert_array_equal(out, pages)


def layers_step(attend, k_pages, v_pages, x, slot, page_table):
    """Each layer appends to its share of one pool, then attends; x feeds the next layer."""
    for layer in range(LAYERS):
        k, first = x[:, :KV_HEADS], layer * PAGES
        k_pages, v_pages = append_kv(k_pages, v_pages, k, 2 * k, slot, first_page=first)
        x = x + attend(x, k_pages, v_pages, page_table, first)
    return k_pages, v_pages, x


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_layers_update_a_donated_pool_in_place(kind):
    tokens = 64 if kind == "prefill" else 8
    length = np.int32(tokens if kind == "prefill" else 1)
    page_table = np.arange(8 * 8, dtype=np.int32).reshape(8, 8)

    def attend(x, k_pages, v_pages, table, first):
        if kind == "decode":
            lengths = jnp.full(8, length)
            return paged_decode_attention(x, k_pages, v_pages, table, lengths, scale=0.1, first_page=first)
        start = jnp.array([0] + [tokens] * 8, jnp.int32)
        kv_len = jnp.zeros(8, jnp.int32).at[0].set(length)
        return paged_prefill_attention(x, k_pages, v_pages, table, kv_len, start, scale=0.1, first_page=first)

    slot = np.arange(tokens, dtype=np.int32) * (1 if kind == "prefill" else 8 * PAGE_SIZE)
    pool = jnp.full((LAYERS * PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), jnp.nan)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, 4, HEAD_DIM), np.float32))
    step = jax.jit(lambda *a: layers_step(attend, *a), donate_argnums=(0, 1))
    compiled = step.lower(pool, pool, x, slot, page_table).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes / 2
    pools = jnp.copy(pool), jnp.copy(pool)
    addresses = [p.unsafe_buffer_pointer() for p in pools]
    k_pages, v_pages, out = compiled(*pools, x, slot, page_table)
    assert [k_pages.unsafe_buffer_pointer(), v_pages.unsafe_buffer_pointer()] == addresses
    assert np.isfinite(out).all()
    assert int(np.isfinite(k_pages).sum()) == LAYERS * tokens * KV_HEADS * HEAD_DIM
