"""What memory devices and host have for KV; how many pages that is, is in `sizing/`."""

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from ..sizing.device_memory import Reported, Share, free_bytes
from ..sizing.pools import in_steps


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
