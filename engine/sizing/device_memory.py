"""How much memory an engine may take, in numbers: of a device that is there, or of one that is not, or of a host.

A GPU's counts in parts of the card, in the meaning of vLLM's `gpu_memory_utilization`: weights, KV and temporaries
together. What JAX's allocator is asked for before it starts is in `startup/gpu_memory.py`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .pools import in_steps

FRACTION = 0.9  # of each GPU; the rest is for CUDA's context, compiled code and the collectives' buffers
FRAGMENTS = 0.02  # of the allocator's memory: what lies between arrays

_MOST_ON_HOST = 2 << 30  # bytes of a CPU mesh for KV


class Share(NamedTuple):
    """The part of each GPU's memory that this process may have."""

    held: float  # by JAX's allocator
    asked: float | None = None  # of it, the most that this engine takes; None: all
    came_late: bool = False  # whether JAX was in use before anybody asked for more than its own default
    preallocates: bool = True  # whether the allocator takes its memory at once


class Reported(NamedTuple):
    """What a device says of its allocator, in bytes."""

    limit: int  # the most that it may hand out
    in_use: int
    pool: int = 0  # what it has taken from the device so far; 0: it does not say

    @classmethod
    def of(cls, stats: Mapping[str, int]) -> "Reported":
        """Read `jax.Device.memory_stats()`."""
        return cls(int(stats["bytes_limit"]), int(stats["bytes_in_use"]), int(stats.get("pool_bytes", 0)))


def free_bytes(reported: Reported, share: Share) -> int:
    """Return bytes that an engine may still take of a device."""
    whole = reported.limit / share.held
    # The allocator takes what it gets where another process holds a part of the card, and its limit does not show it.
    available = reported.pool if share.preallocates and reported.pool else reported.limit
    usable = available if share.asked is None else min(available, share.asked * whole)
    return max(0, int(usable - FRAGMENTS * available) - reported.in_use)


def host_budget(available: int, to_load: int, meshes: int) -> int:
    """Return bytes of each of so many CPU meshes for KV and staging: a quarter of what the host has available once the
    weights are loaded, and at most 2 GiB each."""
    return min(in_steps(max(0, available - to_load) // (4 * meshes)), _MOST_ON_HOST)
