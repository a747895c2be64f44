"""How many pages a mesh has memory for, and refusals that show the arithmetic."""

import ctypes
import math
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..sampling.logits_processors import empty_dense
from ..topology import MeshSpec
from ..worker.kv_cache import abstract_scalars, groups
from .gpu_memory import Reported, Share, free_bytes

# Bytes of temporaries for each logit of a row that is sampled for, and splits of a request in decode attention.
_SAMPLER_BYTES, _MOST_SPLITS = 32, 64


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Return bytes of one page of each cache group: its layers' keys and values together, all shards."""
    per_layer = 2 * page_size * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
    return tuple(len(group.layers) * per_layer for group in groups(model))


def request_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Return bytes of request state and page tables on each device of a mesh: they do not shrink with its size."""
    slots = config.max_num_seqs
    requests = jax.tree.leaves((abstract_scalars(slots), empty_dense(slots, model.vocab_size)))
    tables = len(groups(model)) * config.max_num_seqs * config.max_pages
    size: int = tables * 4 + sum(math.prod(x.shape) * x.dtype.itemsize for x in requests)
    return size


def state_bytes() -> int:
    """Return bytes of one request's scalars, which every transfer takes along to each device of its destination."""
    return sum(math.prod(x.shape) * int(jnp.dtype(x.dtype).itemsize) for x in abstract_scalars(1))


def temporary_bytes(model: ModelConfig, config: EngineConfig, tp: int) -> int:
    """Return bytes of temporaries that a GPU's steps may take on each device, besides weights, KV and request state.

    They are those of the largest prefill step's layers, of the sampler, of decode attention's partial sums, and one
    parameter, the largest, which exists twice while it is replaced. `tests/h100` compares with what XLA plans; a CPU
    takes them from the memory that its KV leaves.
    """
    size, rows = jnp.dtype(config.dtype).itemsize, config.decode_buckets[-1]
    layer = size * (2 * model.intermediate_size // tp + 4 * model.hidden_size)  # gate and up; rows of the hidden state
    # A fused step has the rows of both phases at once.
    fused = rows if any(spec.fused for spec in config.topology.meshes) else 0
    sampled = max(rows, config.prefill_rows + fused) * model.vocab_size * _SAMPLER_BYTES
    heads = -(-model.num_heads // (4 * tp)) * 4
    sums = 4 * 2 * rows * _MOST_SPLITS * heads * model.head_dim
    largest = model.vocab_size * model.hidden_size * size // tp
    return (config.chunk_size + fused) * layer + sampled + sums + largest


def memory_for_kv(
    meshes: Sequence[Mesh], most: int | None, reserved: Sequence[int], share: Share, to_load: int = 0
) -> list[int]:
    """Return bytes that KV pages and staging may take on each mesh, but for `to_load` bytes of weights already loaded;
    meshes may share devices.

    Devices that report their memory give what `share` leaves free on them, less each mesh's `reserved` bytes. CPUs do
    not report: there it is a quarter of the machine's available memory for all meshes together, and at most 2 GiB each.
    `most` is a cap in bytes per mesh; on CPU it stands in place of both.

    Raises:
        ValueError: a GPU does not report its memory, and there is no cap.
    """
    sharing = Counter(device for mesh in meshes for device in mesh.devices.flat)
    budgets = []
    for mesh, aside in zip(meshes, reserved, strict=True):
        device = mesh.devices.flat[0]
        stats = device.memory_stats()
        if stats is not None:
            free = free_bytes(Reported.of(stats), share)
            budget = max(0, free // sharing[device] - aside) * mesh.devices.size
            budgets.append(budget if most is None else min(budget, most))
        elif most is not None:
            budgets.append(most)
        elif device.platform == "cpu":
            left = max(0, _available_memory() - to_load)
            budgets.append(min(in_steps(left // (4 * len(meshes))), 2 << 30))
        else:
            raise ValueError(
                f"{device.device_kind} does not report its memory, as with XLA_PYTHON_CLIENT_ALLOCATOR=platform: "
                "remove that variable, or give kv_cache_bytes."
            )
    return budgets


def in_steps(size: int) -> int:
    """Round down to four binary digits: programs depend on the pools' sizes, and a start on a machine that is a little
    fuller than last time is to find them compiled."""
    return size - size % (1 << max(0, size.bit_length() - 4))


def _available_memory() -> int:
    """Return bytes that programs can take without swapping, as Linux reports it; 8 GiB elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 8 << 30


def give_back_freed() -> None:
    """Give memory that this process has freed back to the system, where the C library has a call for it (glibc).

    Compiling and reading programs leaves some 300 MB of freed memory in the heap, which would count beside the KV.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def longest_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig, part: int) -> int:
    """Find the longest `max_model_len`, at most the config's, of which one request fits into `budget` bytes,
    of which staging is a `part`-th.

    One page's tokens where not even those fit: `pool_that_fits` then says so.
    """

    def fits(pages: int) -> bool:
        shorter = replace(config, max_model_len=max(2, pages * config.page_size))
        return _staging(budget, per_page, shorter, part) + _request(per_page, shorter) <= budget

    pages = bisect_right(range(1, config.max_pages + 1), False, key=lambda pages: not fits(pages))
    return min(config.max_model_len, max(2, max(1, pages) * config.page_size))


def pool_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec, part: int) -> PoolSize:
    """Divide `budget` bytes between a mesh's pools, one per cache group, and the staging of hand-offs.

    `per_page`: bytes of one page of each group. A request of `max_model_len` needs `EngineConfig.most_pages` of each;
    the groups get pages in that proportion, for as many such requests as fit, at most one per slot.

    Staging is a `part`-th, but holds one to eight requests of full length: with room for one only, short requests wait
    for each other's transfers, and each wait is as long as a prefill step.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    staging, request = _staging(budget, per_page, config, part), _request(per_page, config)
    rest = budget - staging
    if rest < request:
        raise ValueError(_too_small(budget, staging, per_page, config, spec))
    needed = [config.most_pages(window) for window in config.windows]
    pages = tuple(min(config.max_num_seqs * count, rest * count // request) for count in needed)
    return PoolSize(pages, per_page, staging)


def _staging(budget: int, per_page: tuple[int, ...], config: EngineConfig, part: int) -> int:
    """Return bytes of `budget` that hand-offs on their way may take."""
    if not config.has_handoffs:
        return 0
    caps = [config.pages_to_send(window) for window in config.windows]
    whole = PoolSize((), per_page, 0).transfer_bytes(config.max_pages, caps)
    return min(max(budget // part, whole), 8 * whole)


def _request(per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Return bytes of pages that one request of full length needs."""
    return sum(config.most_pages(window) * size for window, size in zip(config.windows, per_page, strict=True))


def _too_small(budget: int, staging: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec) -> str:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f} MiB"

    parts = " + ".join(
        f"{config.most_pages(window)} pages of {mib(size)}"
        for window, size in zip(config.windows, per_page, strict=True)
    )
    aside = f", {mib(staging)} of them for hand-offs" if staging else ""
    return (
        f"the KV cache of the {spec.role} mesh does not fit: there are {mib(budget)}{aside}, and one request of "
        f"max_model_len={config.max_model_len} needs {parts} ({config.page_size} tokens each) = "
        f"{mib(_request(per_page, config))}: lower max_model_len, or raise kv_cache_bytes."
    )
