"""Products with quantised weights: against the dequantised product, in parts, over devices, and what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import FORMATS, random_blocks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from twinmesh.kernels_pallas import matmul as module
from twinmesh.kernels_pallas.block_tiles import pack
from twinmesh.kernels_pallas.matmul import Products
from twinmesh.kernels_pallas.quantized import abstract, dequantize, take_rows

N, K = 128, 512
FLOAT = Products("float")
X = np.random.default_rng(5).standard_normal((7, K)).astype(np.float32)


def matmul(x, w, products=FLOAT, **options):
    return module.matmul(x, w, products=products, **options)


def score(x, w):
    return module.score(x, w, products=FLOAT)


@pytest.fixture(autouse=True, params=["xla", "kernel"])
def kernels(request, monkeypatch):
    """With the CPU's kernels, on activations as they are, and as it is where there are none."""
    if request.param == "xla":
        monkeypatch.setattr(module.blocks, "product", lambda *args, **options: None)
    elif module.kernel_for("cpu", "Q4_1") is None:
        pytest.skip("no kernels here")


def weight(name, n=N, k=K):
    """A quantised projection [k, n], and the same in float32."""
    raw = random_blocks(name, n, k, np.random.default_rng(3))
    w = abstract(name, (k, n), 1).with_tiles(pack(name, raw))
    return jax.tree.map(jnp.asarray, w), dequantize(w)[:n].T


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 7])
def test_it_is_the_product_with_the_dequantised_weights(name, rows):
    w, floats = weight(name)
    found = jax.jit(lambda x, w: matmul(x, w))(X[:rows], w)
    expected = X[:rows].astype(np.float64) @ floats
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert found.dtype == np.float32


def test_activations_of_16_bits_meet_weights_of_16_bits():
    w, floats = weight("Q4_1")
    x = jnp.asarray(X, jnp.bfloat16)
    found = jax.jit(lambda x, w: matmul(x, w))(x, w)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ floats.astype(np.float64)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.01, atol=0.01 * np.abs(expected).max())
    assert jax.jit(lambda x, w: score(x, w))(x, w).dtype == np.float32


@pytest.mark.parametrize("n", [128, 129, 150])
def test_a_matrix_larger_than_the_buffer_is_multiplied_in_parts(monkeypatch, n):
    w, floats = weight("Q5_0", n)
    whole = jax.jit(lambda x, w: matmul(x, w))(X, w)
    monkeypatch.setattr(module, "BUFFER_BYTES", 50 * K * 4)
    in_parts = jax.jit(lambda x, w: matmul(x, w))(X, w)
    np.testing.assert_allclose(in_parts, whole, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(in_parts, X @ floats, rtol=1e-4, atol=1e-2)


def test_no_program_holds_more_floats_than_the_buffer(monkeypatch):
    """Not even where a loop of steps multiplies by the same weights again and again."""
    limit = 64 << 10
    monkeypatch.setattr(module, "BUFFER_BYTES", limit)
    weights = [weight("Q4_0", 256)[0] for _ in range(4)]  # 512 KB each as floats

    @jax.jit
    def run(x, weights):
        def step(x, _):
            for w in weights:
                x = jnp.tile(matmul(x, w), (1, 2))
            return x, None

        return jax.lax.scan(step, x, None, length=3)[0]

    planned = run.lower(X, weights).compile().memory_analysis()
    assert planned.temp_size_in_bytes < 4 * limit


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("axes", "shape"), [(("embed", "mlp"), "outputs"), (("mlp", "embed"), "inputs")])
def test_every_device_multiplies_by_its_own_part(name, axes, shape):
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    products = Products("float", mesh, "tp", frozenset({"mlp"}))
    w, floats = weight(name)
    split = products.split(axes, w)
    assert split == shape
    spec = PartitionSpec("tp") if split == "outputs" else PartitionSpec(None, "tp")
    put = jax.device_put(w, NamedSharding(mesh, spec))
    program = jax.jit(lambda x, w: matmul(x, w, split=split, products=products)).lower(X, put).compile()
    expected = X.astype(np.float64) @ floats
    np.testing.assert_allclose(program(X, put), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "all-gather" not in program.as_text()


@pytest.mark.parametrize(("rows", "expected"), [(275, None), (276, None), (320, "outputs")])
def test_a_table_that_does_not_divide_is_whole_on_every_device(rows, expected):
    products = Products("float", Mesh(np.array(jax.devices()[:4]), ("tp",)), "tp", frozenset({"vocab"}))
    assert products.split(("vocab", "embed"), abstract("Q8_0", (rows, 64), 0)) == expected


def test_rows_of_a_divided_table_are_looked_up_where_they_are():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    raw = random_blocks("Q8_0", 320, 64, np.random.default_rng(4))
    table = abstract("Q8_0", (320, 64), 0).with_tiles(pack("Q8_0", raw))
    put = jax.device_put(table, NamedSharding(mesh, PartitionSpec("tp")))
    rows = jax.device_put(np.array([0, 319, 80, 17], np.int32), NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(take_rows).lower(put, rows).compile()
    np.testing.assert_array_equal(program(put, rows), dequantize(table)[[0, 319, 80, 17]])
    assert "all-gather" not in program.as_text()
