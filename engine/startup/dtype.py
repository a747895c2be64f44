"""Which dtype a model runs in: weights and activations alike; norms and softmax are float32 always.

Invariant: the choice is a pure function of what is stored, the model's family, the platform, the CPU's instruction
sets, the rows of a decode step and deterministic mode, so that every start on a machine makes the same one: another
dtype means other tokens and other programs. Nothing is timed; `twinmesh bench dtype` does that.
"""

import re
from collections.abc import Set
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from ...models.config import ModelConfig
from ..config import DTYPES

AUTO = "auto"
# XLA CPU multiplies one 16-bit row many times slower than eight; without kernels steps are padded (`build.py`).
FEWEST_ROWS_FOR_16_BITS = 8
# By instruction set: flags that a CPU has, flags that it lacks, and the dtype that is faster there for batches. The
# first row that fits counts; the table with its measurements is in docs/guides/reproducibility.md.
CPU_TABLE: tuple[tuple[Set[str], Set[str], str], ...] = (
    (frozenset({"avx512_bf16"}), frozenset({"avx512_fp16"}), "bfloat16"),
    (frozenset(), frozenset(), "float32"),
)


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
    asked: DTypeLike,
    model: ModelConfig,
    stored: DTypeLike,
    *,
    platform: str,
    cpu_flags: Set[str],
    max_num_seqs: int,
    deterministic: bool,
) -> jnp.dtype:
    """Choose the dtype that was asked for, or the one that suits.

    Args:
        asked: one of `DTYPES`, or "auto": on a GPU the checkpoint's own if that has 16 bits, else bfloat16; on a CPU
            what `CPU_TABLE` says for steps of at least `FEWEST_ROWS_FOR_16_BITS` rows where nothing has to be
            repeatable, else float32, whatever is stored.
        model: some do not fit float16.
        stored: the checkpoint's own dtype.
        platform: JAX's name of the devices' platform.
        cpu_flags: the CPU's, as `read_cpu_flags` gives them.
        max_num_seqs: requests that a mesh holds at once.
        deterministic: whether the same tokens are expected however requests are scheduled.

    Raises:
        ValueError: an unknown dtype, or float16 where the model overflows in it.
    """
    parsed = parse_dtype(asked)
    if parsed == jnp.float16 and not model.fits_float16:
        raise ValueError(f"dtype='float16' does not hold the activations of {model.family}: use bfloat16 or float32.")
    if parsed is not None:
        return parsed
    if platform == "cpu":
        is_batch = max_num_seqs >= FEWEST_ROWS_FOR_16_BITS and not deterministic
        return jnp.dtype(fastest_on_cpu(cpu_flags) if is_batch else jnp.float32)
    is_half = jnp.dtype(stored) == jnp.float16 and model.fits_float16
    return jnp.dtype(jnp.float16 if is_half else jnp.bfloat16)


def fastest_on_cpu(flags: Set[str]) -> str:
    """Look the faster dtype of batches up in `CPU_TABLE`."""
    return next(dtype for has, lacks, dtype in CPU_TABLE if has <= flags and not lacks & flags)


def read_cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the instruction sets of this machine's CPU by Linux's names; none where the system does not say."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return frozenset(found[1].split() if found else ())
