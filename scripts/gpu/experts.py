"""Checks and times products with stacks of experts on one GPU, for `gpu_suite.py`: GPT-OSS-20B's shapes.

A check compares the kernel with XLA's products in float32 of the same dequantised weights, and a second call with the
first, bit for bit. Times are of the kernel with the list of work and the ordering of activations that go with it, each
call of a chain with the weights of another layer. `floor_us` is the time to read, at the bandwidth of a copy, what the
chosen experts take and the rows in and out; `bfloat16_floor_us` is that of the same experts in 16 bits, which a kernel
without dequantisation could not beat; `tflop_s` is the rate of useful FLOPs. Choices are drawn evenly, as a good router
makes them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas.formats.hopper import HOPPER_FORMATS
from twinmesh.kernels_pallas.grouped import Groups, group, grouped_matmul, grouped_unit
from twinmesh.kernels_pallas.quantized import QuantizedArray, abstract, parameter
from twinmesh.models.config import ClampedGate
from twinmesh.models.moe import Gated
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import attempt, copy_bandwidth, matmul_rate, noise, seconds

EXPERTS, PER_ROW, HIDDEN = 32, 4, 2880
ROWS = (1, 8, 32, 128, 8192)
CHECKED_ROWS = (1, 37, 700)
LAYERS = 4  # whose weights a chain passes: 1.7 GB, which no cache holds
LIMIT = 1e-2  # of an error: rounding weights' products and results to bfloat16 costs about half its epsilon
_UNIT = Gated(ClampedGate(1.702, 7.0))


@dataclass(frozen=True)
class Layer:
    """The experts of a layer."""

    gate: Any  # [X, E, E]
    up: Any
    down: Any
    bias: Array  # [X, E]


jax.tree_util.register_dataclass(Layer, data_fields=["gate", "up", "down", "bias"], meta_fields=[])


def random_stack(name: str | None, experts: int, inputs: int, outputs: int, seed: int) -> Any:
    """Make a stack of random weights of the order of 0.02 in a format; None: bfloat16."""
    if name is None:
        return (0.02 * noise((experts, inputs, outputs), seed)).astype(jnp.bfloat16)
    return random_quantized(abstract(name, (experts, inputs, outputs), 1, 1), seed)


def random_quantized(described: QuantizedArray, seed: int) -> QuantizedArray:
    """Make random values of a quantised parameter, and scales that bring them to the order of 0.02."""
    values = jax.random.bits(jax.random.key(seed), described.values.shape, jnp.uint8)
    size = {"MXFP4": 120, "Q8_0": 3e-4}.get(described.format, 4e-3)  # of MXFP4 an exponent: 2**-7
    scales = jnp.full(described.scales.shape, size, described.scales.dtype)
    mins = None if described.mins is None else jnp.full(described.mins.shape, -0.03, described.mins.dtype)
    return described.with_parts({"values": values, "scales": scales, "mins": mins})


def experts(scale: float) -> Iterator[Facts]:
    """Check every format, then time MXFP4 and bfloat16, and yield `failed` if something is wrong."""
    size = HIDDEN if scale == 1 else 128
    wrong = []
    for name in (*HOPPER_FORMATS, None):
        errors = attempt(functools.partial(_errors, name, size))
        yield {"errors": {name or "bfloat16": errors}}
        if "failed" in errors or not all(error <= LIMIT for error in errors.values()):
            wrong.append(f"{name or 'bfloat16'}: {errors}")
    copy, rate = copy_bandwidth(4e9 * scale), matmul_rate(int(8192 * scale))
    yield {"copy_tb_s": copy / 1e12, "matmul_tflop_s": rate / 1e12}
    for name in ("MXFP4", None):
        layers = [_layer(name, size, 10 * i) for i in range(LAYERS if name else 1)]
        for rows in ROWS:
            rows = max(1, int(rows * min(1.0, 10 * scale)))
            yield {"rows": {f"{name or 'bfloat16'} {rows}": attempt(functools.partial(_timed, layers, rows, copy))}}
    if wrong:
        yield {"failed": "; ".join(wrong)}


def _layer(name: str | None, size: int, seed: int) -> Layer:
    gate, up, down = (random_stack(name, EXPERTS, size, size, seed + i) for i in range(3))
    return Layer(gate, up, down, (0.1 * noise((EXPERTS, size), seed + 3)).astype(jnp.bfloat16))


def _grouped(rows: int) -> tuple[Groups, np.ndarray]:
    """Draw the experts of rows, and bring them into groups."""
    rng = np.random.default_rng(rows)
    chosen = np.stack([rng.permutation(EXPERTS)[:PER_ROW] for _ in range(rows)]).astype(np.int32)
    return group(jnp.asarray(chosen), EXPERTS), chosen


def mixed(x: Array, layer: Layer, groups: Groups) -> Array:
    """Compute the chosen experts for rows [T, E] and add up their results, [T, E] of x's dtype."""
    hidden = grouped_unit(x[groups.rows], (layer.gate, layer.up), (layer.bias, layer.bias), groups, _UNIT)
    done = grouped_matmul(hidden, layer.down, groups.sizes, dtype=jnp.float32)
    return (jnp.sum(done[groups.places], axis=1) / PER_ROW).astype(x.dtype)


def _errors(name: str | None, size: int) -> dict[str, float]:
    """Measure errors by the number of rows: |ours - wanted| / |wanted|; infinite for NaN, or if two calls differ."""
    layer, found = _layer(name, size, 1), dict[str, float]()
    gate, up, down = (parameter(w) if name else w.astype(jnp.float32) for w in (layer.gate, layer.up, layer.down))
    for rows in CHECKED_ROWS:
        x, (groups, chosen) = noise((rows, size), rows), _grouped(rows)
        run = jax.jit(mixed)
        got = np.asarray(run(x, layer, groups), np.float32)
        is_same = np.array_equal(got, np.asarray(run(x, layer, groups), np.float32))
        with jax.default_matmul_precision("highest"):
            want = np.asarray(_wanted(x, gate, up, down, layer.bias, jnp.asarray(chosen)), np.float32)
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        found[str(rows)] = error if is_same and np.isfinite(got).all() else float("inf")
    return found


@jax.jit
def _wanted(x: Array, gate: Array, up: Array, down: Array, bias: Array, chosen: Array) -> Array:
    """Compute every expert for all rows in float32, one after the other."""

    def add(total: Array, one: tuple[Array, ...]) -> tuple[Array, None]:
        index, gate, up, down, bias = one
        wide, bias = x.astype(jnp.float32), bias.astype(jnp.float32)
        hidden = _UNIT(wide @ gate + bias, wide @ up + bias).astype(x.dtype).astype(jnp.float32)
        share = jnp.sum(chosen == index, axis=1, dtype=jnp.float32)[:, None] / PER_ROW
        return total + share * (hidden @ down), None

    each = jnp.arange(EXPERTS, dtype=jnp.int32), gate, up, down, bias
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), each)[0]


def _timed(layers: list[Layer], rows: int, copy: float) -> Facts:
    """Measure the experts of a layer for so many rows."""
    first = layers[0].gate
    size = layers[0].bias.shape[1]
    x, (groups, chosen) = noise((rows, size), rows), _grouped(rows)

    @jax.jit
    def chain(x: Array, layers: list[Layer], groups: Groups) -> Array:
        for layer in layers:
            x = mixed(x, layer, groups)
        return x

    taken = seconds(chain, x, layers, groups) / len(layers)
    used = len(np.unique(chosen))
    numbers, moved = 3 * used * size * size, 2 * rows * PER_ROW * 4 * size
    weights = 3 * used * first.nbytes / EXPERTS
    floor, wide = (weights + moved) / copy, (2 * numbers + moved) / copy
    return {
        "us": 1e6 * taken,
        "experts": used,
        "floor_us": 1e6 * floor,
        "of_floor": floor / taken,
        "bfloat16_floor_us": 1e6 * wide,
        "tflop_s": 2.0 * 3 * rows * PER_ROW * size * size / taken / 1e12,
    }
