"""Which dtype a model runs in: weights, activations and KV alike; norms and softmax are float32 always.

On GPUs the checkpoint decides, on CPUs the speed of matrix products, which differs from one to the next: for 64 rows
bfloat16 is 1.9 times as fast as float32 on one and 0.8 times on another (docs/decisions). So it is measured.
"""

import functools
import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ...models.config import ModelConfig
from ..config import DTYPES

AUTO = "auto"
# XLA CPU multiplies one 16-bit row many times slower than eight, and decode steps are padded to eight (`build.py`).
_FEWEST_ROWS_FOR_16_BITS = 8
# Far from 1, so that noise does not make two starts on one machine choose differently.
_WORTH_IT = 1.4
_SIDE, _TRIALS = 2048, 10


def parse_dtype(asked: DTypeLike) -> jnp.dtype | None:
    """Read the dtype that was asked for; None for "auto".

    Raises:
        ValueError: none of `DTYPES`.
    """
    if isinstance(asked, str) and asked == AUTO:
        return None
    try:
        parsed = jnp.dtype(asked)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise ValueError(f"dtype={asked!r} is not supported: use one of {AUTO}, {', '.join(DTYPES)}.")
    return parsed


def choose_dtype(
    asked: DTypeLike, model: ModelConfig, stored: DTypeLike, *, platform: str, max_num_seqs: int, deterministic: bool
) -> jnp.dtype:
    """Choose the dtype that was asked for, or the one that suits.

    Args:
        asked: one of `DTYPES`, or "auto": on a GPU the checkpoint's own if that has 16 bits, else bfloat16; on a CPU
            float32, or bfloat16 where it is clearly faster for `max_num_seqs` rows and nothing has to be repeatable.
        model: some do not fit float16.
        stored: the checkpoint's own dtype.
        platform: JAX's name of the devices' platform.
        max_num_seqs: requests that a mesh holds at once.
        deterministic: whether the same tokens are expected at the next start.

    Raises:
        ValueError: an unknown dtype, or float16 where the model overflows in it.
    """
    parsed = parse_dtype(asked)
    if parsed == jnp.float16 and not model.fits_float16:
        raise ValueError(f"dtype='float16' does not hold the activations of {model.family}: use bfloat16 or float32.")
    if parsed is not None:
        return parsed
    if platform == "cpu":
        is_batch = max_num_seqs >= _FEWEST_ROWS_FOR_16_BITS and not deterministic
        return jnp.dtype(jnp.bfloat16 if is_batch and speed_of_bfloat16(max_num_seqs) > _WORTH_IT else jnp.float32)
    is_half = jnp.dtype(stored) == jnp.float16 and model.fits_float16
    return jnp.dtype(jnp.float16 if is_half else jnp.bfloat16)


@functools.cache
def speed_of_bfloat16(rows: int) -> float:
    """Measure how many times as fast as in float32 this machine multiplies so many rows by a matrix in bfloat16.

    Both alternate, and the best of each counts; it takes a fraction of a second, once per process.
    """
    product = jax.jit(jnp.matmul)
    operands = [
        (jnp.ones((rows, _SIDE), dtype), jnp.ones((_SIDE, _SIDE), dtype)) for dtype in (jnp.float32, jnp.bfloat16)
    ]
    rounds = [[_seconds(product, *pair) for pair in operands] for _ in range(_TRIALS + 1)]
    full, half = (min(times) for times in zip(*rounds[1:], strict=True))  # the first round compiles
    return float(full / half)


def _seconds(product: jax.stages.Wrapped, x: jax.Array, y: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(product(x, y))
    return time.perf_counter() - start
