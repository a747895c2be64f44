"""What memory devices and host have for KV; how many pages that is, is in `sizing/`."""

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..sizing.device_memory import FRAGMENTS, Reported, Share, free_bytes, host_budget
from ..sizing.fitting import Fit, Memory, check_fits
from ..topology import MeshSpec
from .quantization import Quantized


def memory_for_kv(
    meshes: Sequence[Mesh],
    most: int | None,
    reserved: Sequence[int],
    share: Share,
    to_load: int = 0,
    on_host: int | None = None,
) -> list[int]:
    """Return bytes that KV pages and staging may take on each mesh, but for `to_load` bytes of weights already loaded;
    meshes may share devices, and on CPUs `on_host` meshes, with those of other processes, share the host's memory.

    Devices that report their memory give what `share` leaves free on them, less each mesh's `reserved` bytes. CPUs do
    not report: there it is a quarter of the machine's available memory for all meshes together, and at most 2 GiB each.
    `most` is a cap in bytes per mesh; on CPU it stands in place of both.

    Raises:
        ValueError: a GPU does not report its memory, and there is no cap.
    """
    sharing = Counter(device for mesh in meshes for device in mesh.devices.flat)
    budgets = []
    for mesh, aside in zip(meshes, reserved, strict=True):
        device = mesh.local_devices[0]
        stats = device.memory_stats()
        if stats is not None:
            free = free_bytes(Reported.of(stats), share)
            budget = max(0, free // sharing[device] - aside) * mesh.devices.size
            budgets.append(budget if most is None else min(budget, most))
        elif most is not None:
            budgets.append(most)
        elif device.platform == "cpu":
            budgets.append(host_budget(available_memory(), to_load, len(meshes) if on_host is None else on_host))
        else:
            raise ValueError(
                f"{device.device_kind} does not report its memory, as with XLA_PYTHON_CLIENT_ALLOCATOR=platform: "
                "remove that variable, or give kv_cache_bytes."
            )
    return budgets


def check_room(
    name: str,
    model: ModelConfig,
    config: EngineConfig,
    meshes: Sequence[Mesh],
    share: Share,
    part: int,
    asked_len: int | None,
    quantized: Quantized,
    on: Sequence[int] | None = None,
) -> None:
    """Refuse a model that does not fit, before any of its weights is read.

    Args:
        name: of the model, in the message.
        model: the checkpoint's.
        config: the engine's, without sizes of pools.
        meshes: the engine's.
        share: of GPUs' memory.
        part: hand-offs on their way get such a part of the KV memory.
        asked_len: the max_model_len that was asked for, if any.
        quantized: which weights stay quantised.
        on: the numbers of `meshes` in the topology; None: they are all of it. On CPUs, of all that share the host's
            memory, also those of other processes.

    Raises:
        ValueError: says what is needed, what there is, and the nearest remedy.
    """
    specs = config.topology.meshes if on is None else tuple(config.topology.meshes[number] for number in on)
    if meshes[0].devices.flat[0].platform == "cpu":
        there = available_memory()
        memory = Memory(there, "what the host has available", is_host=True)
        shared = {specs: memory}
    else:
        shared = _on_gpus(meshes, specs, share)
    for on_it, memory in shared.items():
        check_fits(Fit(name, model, config, on_it, memory, part, asked_len, quantized.kept, quantized.stored))


def _on_gpus(meshes: Sequence[Mesh], specs: tuple[MeshSpec, ...], share: Share) -> dict[tuple[MeshSpec, ...], Memory]:
    """Return the least memory of a device for each set of meshes that share one; devices that do not report theirs are
    left out."""
    found: dict[tuple[MeshSpec, ...], Memory] = {}
    for device in {device for mesh in meshes for device in mesh.local_devices}:
        stats = device.memory_stats()
        if stats is None:
            continue
        on_it = tuple(spec for mesh, spec in zip(meshes, specs, strict=True) if device in mesh.devices.flat)
        reported = Reported.of(stats)
        text = (
            f"{share.asked or share.held:g} of {device.device_kind}, less what is in use and {FRAGMENTS:.0%} for gaps"
        )
        memory = Memory(free_bytes(reported, share), text)
        found[on_it] = min(found.get(on_it, memory), memory)
    return found


def available_memory() -> int:
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
