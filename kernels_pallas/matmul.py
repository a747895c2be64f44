"""Products of activations with weights: the one place that chooses what computes them, while a program is traced.

On CPUs a product of up to 64 rows runs in a kernel of `cpu/`, which reads the weights once for all rows and gives a row
the same bits whatever the other rows are; what the kernels do not take, more rows included, and all other devices run
XLA's product. So does a program whose arrays are split over several CPUs, where XLA would gather the weights in front
of a kernel: its compiler has to say so by `jax.sharding.use_abstract_mesh`.
"""

import jax
from jax import Array

from .cpu import calls
from .dispatch import runs_on_cpu

_MANUAL = jax.sharding.AxisType.Manual


def matmul(x: Array, w: Array) -> Array:
    """Multiply x [T, K] by weights [K, N] -> [T, N] of x's dtype, summed in float32."""
    product = calls.product(x, w, by_output=False) if _is_on_one_cpu() else None
    if product is not None:
        return product.astype(x.dtype)
    return jax.numpy.matmul(x, w, precision=calls.precision(w.dtype))


def score(x: Array, w: Array) -> Array:
    """Multiply x [T, K] by weights that lie by output, [N, K] -> [T, N] float32: a head over an embedding."""
    product = calls.product(x, w, by_output=True) if _is_on_one_cpu() else None
    return calls.plain_product(x, w, by_output=True) if product is None else product


def _is_on_one_cpu() -> bool:
    """Whether what is traced runs on one CPU device, or on each of several by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return runs_on_cpu() and (mesh.size <= 1 or all(kind == _MANUAL for kind in mesh.axis_types))
