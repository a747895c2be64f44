"""Products by the kernels of this CPU against float64: awkward sizes, drawn contents, and bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from twinmesh.kernels_pallas.cpu import calls, loader
from twinmesh.kernels_pallas.matmul import matmul, score

pytestmark = pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")
DTYPES = ["float32", "bfloat16"]
FUNCTIONS = [matmul, score]


def by_kernel(function, x, w):
    return np.asarray(jax.jit(function)(x, w), np.float32)


def is_by_kernel(function, x, w):
    return "custom_call @twinmesh." in jax.jit(function).lower(x, w).as_text()


def draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(function, rows, depth, columns, dtype, seed=0):
    w = draw((columns, depth) if function is score else (depth, columns), dtype, seed + 1)
    return draw((rows, depth), dtype, seed), w


def exact(function, x, w):
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    w = w.T if function is score else w
    return x @ w, np.abs(x) @ np.abs(w)


def check(function, x, w):
    found, (want, size) = by_kernel(function, x, w), exact(function, x, w)
    # A sum of n products errs by less than n times half a unit of the sum of their sizes; bfloat16 rounds the result.
    is_rounded = jax.eval_shape(function, x, w).dtype == jnp.bfloat16
    bound = 2.0**-21 * x.shape[1] ** 0.5 * size + 2.0**-8 * np.abs(want) * is_rounded
    assert (np.abs(found - want) <= bound + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 576, 192), (3, 1, 1), (7, 95, 47), (8, 96, 48), (15, 97, 49), (33, 193, 65), (64, 31, 130), (2, 1536, 15)],
)
def test_any_size_is_right(function, dtype, rows, depth, columns):
    x, w = operands(function, rows, depth, columns, dtype)
    assert is_by_kernel(function, x, w)
    check(function, x, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_contents_are_right(function, dtype, data):
    """Values of very different sizes, zeros and signed zeros among them, at one shape."""
    x, w = operands(function, 5, 101, 67, dtype, seed=data.draw(st.integers(0, 2**31)))
    sizes = st.lists(st.sampled_from([0.0, -0.0, 1e-12, 1.0, -3.0, 1e12]), min_size=101, max_size=101)
    scale = np.array(data.draw(sizes))
    check(function, (x * scale.astype(np.float32)).astype(dtype), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("outputs", [150, 16, 160, 592])
def test_a_rows_bits_are_its_own(function, dtype, outputs):
    """Beside any number of other rows, also where a few rows pass by in long runs; 65 are more than a kernel takes."""
    x, w = operands(function, 65, 200, outputs, dtype)
    assert not is_by_kernel(function, x, w)
    want = by_kernel(function, x[:64], w)
    for rows in (1, 2, 3, 4, 7, 8, 15, 31, 32, 33):
        np.testing.assert_array_equal(by_kernel(function, x[:rows], w), want[:rows])
        np.testing.assert_array_equal(by_kernel(function, x[64 - rows : 64], w), want[64 - rows :])
    np.testing.assert_allclose(by_kernel(function, x, w)[:64], want, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_alone(function, dtype, value):
    x, w = operands(function, 9, 64, 70, dtype)
    want = by_kernel(function, x, w)
    found = by_kernel(function, x.at[4, 3].set(value), w)
    assert not np.isfinite(found[4]).any()
    np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(want, 4, 0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_the_kernels_do_not_take_is_xlas(function):
    for x, w in (
        operands(function, 4, 8, 8, "float16"),
        (draw((4, 8), "float32"), draw((8, 8), "bfloat16")),
        (draw((0, 8), "float32"), draw((8, 8), "float32")),
        (draw((4, 0), "float32"), draw((8, 0) if function is score else (0, 8), "float32")),
    ):
        assert not is_by_kernel(function, x, w)
        assert by_kernel(function, x, w).shape == (x.shape[0], 8)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_are_those_of_the_product(function):
    x, w = operands(function, 5, 20, 30, "float32")
    plain = (lambda x, w: x @ w.T) if function is score else (lambda x, w: x @ w)
    for argument in (0, 1):
        found, want = (jax.grad(lambda x, w, f=f: jnp.sin(f(x, w)).sum(), argument)(x, w) for f in (function, plain))
        np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_batch_of_products_is_mapped(function):
    x, w = operands(function, 6, 20, 30, "float32")
    found = jax.vmap(lambda x: function(x, w))(x.reshape(3, 2, 20))
    np.testing.assert_array_equal(found.reshape(6, 30), by_kernel(function, x, w))


def test_work_shared_by_threads_has_equal_bits_on_eight_devices():
    """100 small calls a program, on all devices at once: tasks that come too late for their call find others' jobs."""
    layers = [operands(matmul, 1, 64, 64, "float32", seed)[1] for seed in range(100)]

    @jax.jit
    def program(x, layers):
        for w in layers:
            x = jnp.tanh(matmul(x, w))
        return x

    x = draw((2, 64), "float32")
    placed = [jax.device_put((x, layers), device) for device in jax.devices()[:8]]
    want = np.asarray(program(*placed[0]))
    for _ in range(20):
        for result in [program(*arguments) for arguments in placed]:
            np.testing.assert_array_equal(result, want)


def test_a_program_over_two_devices_computes_the_same():
    x, w = operands(matmul, 4, 64, 96, "float32")
    want = by_kernel(matmul, x, w)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "tp")))
    np.testing.assert_array_equal(by_kernel(matmul, x, split), want)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as the engine compiles: XLA splits its own product
        assert not is_by_kernel(matmul, x, split)
        np.testing.assert_allclose(by_kernel(matmul, x, split), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_matrices", [True, False])
@pytest.mark.parametrize(("head_dim", "attends"), [(64, True), (10, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_are_compiled_ahead_are_those_that_a_model_calls(dtype, head_dim, attends, has_matrices):
    products, attention = (
        [f"product_{dtype}", f"score_{dtype}"],
        [f"{kind}_{dtype}:{head_dim}" for kind in ("decode", "prefill")],
    )
    made = calls.kernels_of(dtype, [(dtype, dtype)], head_dim, has_matrices=has_matrices)
    assert made == products * has_matrices + attention * attends
    assert calls.kernels_of("float16", [(dtype, dtype)], head_dim, has_matrices=has_matrices) == []


def test_kernels_are_those_of_what_every_mesh_stores():
    pages = [("bfloat16", "bfloat16"), ("int8", "float8_e4m3fn"), ("int8", "bfloat16"), ("int8", "float8_e4m3fn")]
    made = calls.kernels_of("bfloat16", pages, 64, has_matrices=False)
    kinds = [f"{phase}_{kind}:64" for kind in ("bfloat16", "int8_fp8") for phase in ("decode", "prefill")]
    assert made == kinds  # no kernel takes pages of which only one side has 8 bits
