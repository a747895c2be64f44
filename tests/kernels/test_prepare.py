"""What heads pass before attention: the formula against float64, and the interpreted Hopper kernel against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas import prepare
from twinmesh.kernels_pallas.arguments import NewTokens, Pools
from twinmesh.kernels_pallas.attention import Rotation, prepare_heads

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
PAGES = 6
# Of two layers: the second's first page is 2. The first token of page 0, one of page 1, the last of page 3; the rest
# are past the pool.
FIRST_PAGE = 2


def draw(heads, head_dim, page_size, dtype, has_norms, seed=0):
    rng = np.random.default_rng(seed)
    slot = np.array([0, PAGES * page_size, page_size + 3, 4 * page_size - 1, 4 * page_size, 2**31 - 1], np.int32)
    q, k, v = (rng.standard_normal((len(slot), h, head_dim)).astype(dtype) for h in (heads[0], heads[1], heads[1]))
    angle = rng.standard_normal((len(slot), head_dim // 2)).astype(np.float32)
    norms = rng.standard_normal((2, head_dim)).astype(np.float32) if has_norms else (None, None)
    pool = np.full((PAGES, page_size, heads[1], head_dim), np.nan, dtype)
    return q, k, v, Rotation(np.cos(angle), np.sin(angle), *norms, eps=1e-3), pool, pool, slot


def by_hand(x, cos, sin, weight, eps):
    """One head at a time, in float64, as complex numbers."""
    out = np.zeros(x.shape)
    half = x.shape[-1] // 2
    for token, head in np.ndindex(x.shape[:2]):
        row = x[token, head].astype(np.float64)
        if weight is not None:
            row = row / np.sqrt(np.mean(row**2) + eps) * weight
        turned = (row[:half] + 1j * row[half:]) * (cos[token].astype(np.float64) + 1j * sin[token])
        out[token, head] = np.concatenate([turned.real, turned.imag])
    return out


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("heads", [(6, 2), (1, 1), (5, 5)])
def test_heads_are_normed_turned_and_written_to_their_slots(heads, has_norms):
    q, k, v, rotation, pool, _, slot = draw(heads, 8, 4, np.float32, has_norms)
    prepared, k_pages, v_pages = jax.jit(prepare_heads)(q, k, v, rotation, pool, pool, slot, first_page=FIRST_PAGE)
    wanted = [by_hand(x, rotation.cos, rotation.sin, w, 1e-3) for x, w in ((q, rotation.q_norm), (k, rotation.k_norm))]
    np.testing.assert_allclose(prepared, wanted[0], atol=2e-6)
    for pages, new in ((k_pages, wanted[1]), (v_pages, v)):
        flat = np.asarray(pages).reshape(-1, *pool.shape[2:])[FIRST_PAGE * 4 :]
        for token in (0, 2, 3):
            np.testing.assert_allclose(flat[slot[token]], new[token], atol=2e-6)
        assert np.isfinite(pages).sum() == 3 * heads[1] * 8


# (heads, head_dim, page_size, dtype, norms): every head_dim, page size and dtype; more than 64 heads; values in the
# same 64 rows as keys, and not.
VARIANTS = [
    ((8, 2), 64, 64, "bfloat16", True),
    ((6, 1), 128, 16, "float16", False),
    ((4, 2), 256, 128, "bfloat16", True),
    ((60, 4), 64, 32, "bfloat16", False),
    ((64, 8), 128, 64, "bfloat16", True),
]


@pytest.mark.parametrize(("heads", "head_dim", "page_size", "dtype", "has_norms"), VARIANTS)
def test_the_kernel_does_what_the_formula_does(heads, head_dim, page_size, dtype, has_norms):
    arrays = draw(heads, head_dim, page_size, jnp.dtype(dtype), has_norms)
    *projected, k_pages, v_pages, slot = arrays
    new, pools = NewTokens(*projected, slot), Pools(k_pages, v_pages, np.full(1, FIRST_PAGE, np.int32))
    got = jax.jit(functools.partial(prepare.prepare_heads, interpret=INTERPRET))(new, pools)
    want = jax.jit(prepare_heads)(*arrays, first_page=FIRST_PAGE)
    for mine, other in zip(got, want, strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, other))
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(other))
        # A norm rounded the other way is one step of 16 bits, and so is the result.
        epsilon = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(mine, other, rtol=2 * epsilon, atol=2 * epsilon * np.nanmax(np.abs(other)))
        assert np.mean((mine != other)[np.isfinite(mine)]) < 0.02
    np.testing.assert_array_equal(np.asarray(got[2], np.float32), np.asarray(want[2], np.float32))  # values are copied


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": shape(7, 5, 8)}, r"q is float32\[7, 5, 8\].*multiple of k_pages' heads"),
        ({"q": shape(7, 6, 4)}, r"q is float32\[7, 6, 4\].*D as in k_pages"),
        ({"q": shape(7, 6, 8, dtype=jnp.bfloat16)}, "q is bfloat16"),
        ({"q": shape(7, 48)}, r"q is float32\[7, 48\]"),
        ({"k": shape(7, 3, 8)}, r"k has shape \(7, 3, 8\)"),
        ({"cos": shape(7, 8)}, r"rotation.cos is float32\[7, 8\].*float32\[7, 4\]"),
        ({"sin": shape(6, 4)}, r"rotation.sin is float32\[6, 4\]"),
        ({"q_norm": shape(4)}, r"rotation.q_norm is float32\[4\].*float32\[8\]"),
        ({"k_norm": shape(8, dtype=jnp.bfloat16)}, r"rotation.k_norm is bfloat16\[8\]"),
        ({"k_norm": None}, "rotation has one norm"),
        ({"first_page": shape(1, dtype=jnp.int32)}, r"first_page is int32\[1\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = {
        "q": shape(7, 6, 8), "k": shape(7, 2, 8), "v": shape(7, 2, 8), "cos": shape(7, 4), "sin": shape(7, 4),
        "q_norm": shape(8), "k_norm": shape(8), "k_pages": shape(5, 16, 2, 8), "v_pages": shape(5, 16, 2, 8),
        "slot": shape(7, dtype=jnp.int32),
    }  # fmt: skip

    def call(arrays):
        parts = {name: arrays.pop(name) for name in ("cos", "sin", "q_norm", "k_norm")}
        return prepare_heads(rotation=Rotation(**parts), **arrays)

    jax.eval_shape(call, dict(fitting))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, fitting | change)
