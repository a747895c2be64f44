"""Chooses the implementation of attention, what comes before it, and experts that a program gets, while it is traced.

Hopper GPUs run the Mosaic kernels, CPUs attention in those of `cpu/` where there are any; all else runs in
`xla.py`. The GPU is that of the abstract mesh in whose context the trace runs (inside `shard_map`, or when compiling
for an absent GPU), else JAX's first device. In the second case the program may still be meant for the CPU of a machine
that has a GPU, so both are traced and lowering picks one. Shapes that the Mosaic kernels do not support run in
`xla.py` too, with one warning.

The Mosaic kernels are imported when a program is traced for a GPU: their imports take longer than JAX's own.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import xla
from .arguments import AttentionOptions, NewTokens, PagedKV, Pools
from .cpu import calls
from .formats.hopper import is_hopper
from .pages import Pages, QuantizedPages
from .quantized import QuantizedArray
from .tiles import decode_tiles, prefill_tiles

_log = logging.getLogger(__name__)
_CORES = 132  # multiprocessors of an H100 SXM or an H200, for devices that do not report theirs
# Mosaic tries layouts of shared memory without end where heads are no multiple of this (2 key/value heads, no norms).
_ROWS = 8


def paged_prefill_attention(q: Array, kv: PagedKV, q_start: Array, options: AttentionOptions) -> Array:
    """Compute `attention.paged_prefill_attention` by the implementation that fits; arguments are checked."""

    def kernel(cores: int) -> Callable[..., Array]:
        from . import prefill

        tiles = prefill_tiles(*_shape(q, kv), _capacity(kv, options), is_quantized=_is_quantized(kv))
        return functools.partial(prefill.paged_prefill_attention, options=options, tiles=tiles, cores=cores)

    attended = calls.paged_prefill_attention(q, kv, q_start, options) if runs_on_cpu() else None
    if attended is not None:
        return attended
    plain = functools.partial(xla.paged_prefill_attention, options=options)
    return _choose(kernel, plain, (q, kv, q_start), q, kv.k_pages, kv.v_pages, is_prefill=True)


def paged_decode_attention(q: Array, kv: PagedKV, options: AttentionOptions) -> Array:
    """Compute `attention.paged_decode_attention` by the implementation that fits; arguments are checked."""

    def kernel(cores: int) -> Callable[..., Array]:
        from . import decode

        tiles = decode_tiles(*_shape(q, kv), _capacity(kv, options), is_quantized=_is_quantized(kv))
        return functools.partial(decode.paged_decode_attention, options=options, tiles=tiles, cores=cores)

    attended = calls.paged_decode_attention(q, kv, options) if runs_on_cpu() else None
    if attended is not None:
        return attended
    plain = functools.partial(xla.paged_decode_attention, options=options)
    return _choose(kernel, plain, (q, kv), q, kv.k_pages, kv.v_pages)


def prepare_heads(new: NewTokens, pools: Pools) -> tuple[Array, Pages, Pages]:
    """Compute `attention.prepare_heads` by the implementation that fits; arguments are checked."""
    is_plain = pools.k_pages.dtype == pools.v_pages.dtype == new.q.dtype
    if new.q.shape[1] % _ROWS or new.k.shape[1] % _ROWS or not is_plain:
        return xla.prepare_heads(new, pools)

    def kernel(cores: int) -> Callable[..., tuple[Array, Pages, Pages]]:
        from . import prepare

        return prepare.prepare_heads

    return _choose(kernel, xla.prepare_heads, (new, pools), new.q, pools.k_pages, pools.v_pages)


def grouped_matmul(
    x: Array,
    stacks: tuple[Array | QuantizedArray, ...],
    biases: tuple[Array, ...],
    sizes: Array,
    *,
    combine: Callable[..., Array] | None = None,
    dtype: jax.typing.DTypeLike,
    plain: Callable[..., Array],
) -> Array:
    """Compute `grouped_matmul.grouped_matmul` on a Hopper GPU; else `plain` of the same four arrays."""
    arrays = x, stacks, biases, sizes
    kind, cores, is_certain = gpu_to_trace_for()
    if kind is None or not is_hopper(kind) or not _is_on_one_device():
        return plain(*arrays)
    from . import grouped_matmul as hopper

    for w in stacks:
        if (reason := hopper.why_unsupported(x, w)) is not None:
            warn_once(f"{reason} XLA makes floats of a part of the weights at a time.")
            return plain(*arrays)
    kernel = functools.partial(hopper.grouped_matmul, combine=combine, dtype=jnp.dtype(dtype), cores=cores)
    if is_certain:
        made: Array = kernel(*arrays)
        return made
    chosen: Array = jax.lax.platform_dependent(*arrays, cuda=kernel, default=plain)
    return chosen


def device_kind() -> str:
    """Return what JAX calls its first device if that is a GPU; empty: it is none."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else ""


def _is_on_one_device() -> bool:
    """Whether what is traced runs on one device, or on each of several by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size <= 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)


def _choose[Result](
    kernel: Callable[[int], Callable[..., Result]],  # from the number of multiprocessors
    plain: Callable[..., Result],
    arrays: tuple[Any, ...],
    q: Array,  # among them
    k_pages: Pages,
    v_pages: Pages,
    *,
    is_prefill: bool = False,
) -> Result:
    kind, cores, is_certain = gpu_to_trace_for()
    if kind is None:
        return plain(*arrays)
    if not is_hopper(kind):
        warn_once(f"{kind} is not a Hopper GPU: paged attention runs in plain XLA.")
        return plain(*arrays)
    from .mosaic import why_unsupported

    reason = why_unsupported(q, k_pages, v_pages, is_prefill=is_prefill)
    if reason is not None:
        warn_once(f"{reason} Paged attention runs in plain XLA.")
        return plain(*arrays)
    if is_certain:
        return kernel(cores)(*arrays)
    chosen: Result = jax.lax.platform_dependent(*arrays, cuda=kernel(cores), default=plain)
    return chosen


def gpu_to_trace_for() -> tuple[str | None, int, bool]:
    """Return kind and number of multiprocessors of the GPU to trace for, and whether the program surely runs there.

    The kind is None if the program is traced for another device than a GPU.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return (abstract.device_kind if abstract.platform == "gpu" else None), abstract.num_cores or _CORES, True
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None, 0, True
    return device.device_kind, device.core_count, False


def runs_on_cpu() -> bool:
    """Whether the program that is being traced surely runs on a CPU."""
    kind, _, is_certain = gpu_to_trace_for()
    return kind is None and is_certain and jax.devices()[0].platform == "cpu"


@functools.cache
def warn_once(sentence: str) -> None:
    """Log a warning, unless this process has logged the same before."""
    _log.warning(sentence)


def _shape(q: Array, kv: PagedKV) -> tuple[int, int, int]:
    page_size, kv_heads, head_dim = kv.k_pages.shape[1:]
    return head_dim, q.shape[1] // kv_heads, page_size


def _is_quantized(kv: PagedKV) -> bool:
    return isinstance(kv.k_pages, QuantizedPages)


def _capacity(kv: PagedKV, options: AttentionOptions) -> int:
    """Count the most tokens of a request that a query can attend to."""
    return kv.capacity if options.window is None else min(kv.capacity, options.window)
