"""The oracle against a loop over tokens and heads in float64, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from twinmesh.kernels_pallas import reference

OPTIONS = [
    {},
    {"window": 5},
    {"softcap": 2.0},
    {"sink": np.linspace(-1, 3, 6).astype(np.float32)},
    {"window": 11, "softcap": 1.5, "sink": np.linspace(2, -2, 6).astype(np.float32)},
]


def by_hand(case, *, scale, window=None, softcap=None, sink=None):
    out = np.zeros(case.q.shape, np.float64)
    for r, length in enumerate(case.kv_len):
        for row in range(case.q_start[r], case.q_start[r + 1]):
            position = length - (case.q_start[r + 1] - row)
            first = 0 if window is None else max(0, position - window + 1)
            for h in range(case.q.shape[1] if length else 0):
                kv = h // (case.q.shape[1] // case.k_pages.shape[2])
                k, v = (dense[r][first : position + 1, kv].astype(np.float64) for dense in (case.dense_k, case.dense_v))
                scores = k @ case.q[row, h].astype(np.float64) * scale
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                weights = np.exp(scores)
                out[row, h] = weights @ v / (weights.sum() + (0 if sink is None else np.exp(float(sink[h]))))
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_prefill_is_the_textbook_formula(make_case, options):
    case = make_case([7, 8, 9, 0, 30, 1], [7, 3, 0, 0, 20, 1], tokens=36)
    got = jax.jit(lambda arrays: oracle.paged_prefill_attention(**arrays, scale=0.3, **options))(case.prefill)
    np.testing.assert_allclose(got, by_hand(case, scale=0.3, **options), atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_decode_is_the_textbook_formula(make_case, options):
    case = make_case([7, 8, 9, 0, 90, 1])
    run = jax.jit(lambda arrays: oracle.paged_decode_attention(**arrays, scale=0.3, **options))
    got = run({"q": case.q, **case.cache})
    np.testing.assert_allclose(got, by_hand(case, scale=0.3, **options), atol=2e-6)


def test_gradients_are_finite_and_right_although_tails_hold_nan(make_case):
    case = make_case([5, 0, 12], [3, 0, 4], tokens=9)

    @jax.jit
    def loss(q):
        prefill = {**jax.tree.map(jnp.asarray, case.prefill), "q": q}
        return jnp.sum(oracle.paged_prefill_attention(**prefill, scale=0.3, window=6, softcap=2.0) ** 2)

    gradient = jax.grad(loss)(case.q)
    assert np.isfinite(gradient).all()
    assert not gradient[7:].any()
    direction = np.random.default_rng(1).standard_normal(case.q.shape).astype(np.float32)
    slope = (loss(case.q + 1e-2 * direction) - loss(case.q - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-2)


def test_gradients_reach_the_pages_and_only_the_used_slots(make_case):
    case = make_case([5, 12], [2, 4])

    @jax.jit
    def loss(pages):
        prefill = {**jax.tree.map(jnp.asarray, case.prefill), "k_pages": pages[0], "v_pages": pages[1]}
        return jnp.sum(oracle.paged_prefill_attention(**prefill, scale=0.3) ** 2)

    for pages, gradient in zip((case.k_pages, case.v_pages), jax.grad(loss)((case.k_pages, case.v_pages)), strict=True):
        assert np.isfinite(gradient).all()
        assert gradient[~np.isnan(pages)].any()
        assert not gradient[np.isnan(pages)].any()


def test_append_writes_each_slot_and_drops_padding():
    k_pages = v_pages = np.zeros((3, 4, 1, 2), np.float32)
    k = np.arange(1, 7, dtype=np.float32).reshape(3, 1, 2)
    got_k, got_v = reference.append_kv(
        jnp.asarray(k_pages), jnp.asarray(v_pages), k, -k, np.array([6, 12, 0], np.int32)
    )
    k_pages[1, 2], k_pages[0, 0] = k[0], k[2]
    np.testing.assert_array_equal(got_k, k_pages)
    np.testing.assert_array_equal(got_v, -k_pages)
