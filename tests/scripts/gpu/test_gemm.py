"""The experimental product of few rows: in the interpreter with race detection, and compiled for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.scripts.gpu import gemm as gpu_gemm

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


# Rows that are padded and that are not; one part of K and several; fewer pieces than blocks, and more.
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "cores", "dtype"),
    [(1, 256, 256, 3, "bfloat16"), (13, 768, 128, 4, "float16"), (64, 64, 384, 2, "bfloat16")],
)
def test_a_product_of_few_rows_is_that_of_float32(rows, depth, columns, cores, dtype):
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in ((rows, depth), (depth, columns)))
    got = gpu_gemm.skinny_matmul(x, weight, cores=cores, interpret=INTERPRET)
    want = x.astype(np.float32) @ weight.astype(np.float32)
    assert got.dtype == dtype
    # The sum is rounded once.
    assert np.linalg.norm(np.asarray(got, np.float32) - want) <= float(jnp.finfo(dtype).eps) * np.linalg.norm(want)


def test_k_is_cut_so_that_all_multiprocessors_have_work():
    plans = {name: gpu_gemm.cut(8, *reversed(shape), 132) for name, shape in gpu_gemm.SHAPES.items()}
    for plan in plans.values():
        pieces = plan.tiles * plan.parts
        assert pieces / (-(-pieces // 132) * 132) > 0.8
        assert plan.steps * plan.parts * 64 == plan.depth
    assert all(gpu_gemm.cut(rows, 4096, 12288, 132).stages >= 4 for rows in (8, 32, 128))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((128, 128), jnp.bfloat16), r"x has shape \(2, 64\)"),
        (jnp.zeros((129, 64), jnp.bfloat16), jnp.zeros((64, 128), jnp.bfloat16), r"\[1 to 128, 64\]"),
        (jnp.zeros((2, 96), jnp.bfloat16), jnp.zeros((96, 128), jnp.bfloat16), "K must be a multiple of 64"),
        (jnp.zeros((2, 64)), jnp.zeros((64, 128)), "both must be bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        gpu_gemm.skinny_matmul(x, weight, cores=132)


def test_a_row_holds_the_time_of_xla_and_why_there_is_none_of_ours():
    row = gpu_gemm.gemm_row(3, 128, 256, 1e9)
    assert row["xla_us"] > 0
    if jax.default_backend() == "cpu":
        assert row["pallas_us"] is row["ratio"] is None
        assert row["reason"]
