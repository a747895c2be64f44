"""The memory plan of an engine on devices that need not be there: its configuration and its pools, or a refusal.

The arithmetic is start-up's own (`sizing/`): the same defaults, the same buckets, the same pages. What start-up asks
devices and files is given here: the kind of device, its memory, and which weights stay quantised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..sizing.asked import Asked
from ..sizing.defaults import Defaults, defaults_for, engine_config
from ..sizing.device_memory import FRACTION, FRAGMENTS, Reported, Share, free_bytes, host_budget
from ..sizing.fitting import Fit, Memory, Need, check_fits, gib
from ..sizing.heads import check_tp, model_on
from ..sizing.pools import size_pools
from ..topology import MeshSpec


@dataclass(frozen=True)
class DeviceMemory:
    """A kind of device, as far as its memory goes."""

    kind: str  # as JAX names it, or short, as in "h100"
    bytes: int | None  # of each GPU, or available on a CPU's host; None: only `kv_cache_bytes` says what there is
    platform: str = "gpu"  # as JAX names it

    @property
    def defaults(self) -> Defaults:
        """Return what an engine gets on it where nobody says otherwise."""
        return defaults_for(self.platform, self.kind.upper())


class Planned(NamedTuple):
    """What an engine's memory is divided into."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]  # of each mesh
    needs: tuple[Need, ...]  # of each mesh, on each of its devices; on a host, on all of them together
    memory: Memory | None  # that each device has, or the host; None: nobody says


def capacity(
    model: ModelConfig,
    asked: Asked,
    device: DeviceMemory,
    dtype: str = "bfloat16",
    *,
    name: str = "the model",
    formats: Mapping[str, str] | None = None,
    has_kernels: bool = False,
) -> tuple[EngineConfig, tuple[PoolSize, ...]]:
    """Return the configuration and the pools that an engine would have; arguments and errors as of `plan_memory`."""
    planned = plan_memory(model, asked, device, dtype, name=name, kept=formats, has_kernels=has_kernels)
    return planned.config, planned.pools


def plan_memory(
    model: ModelConfig,
    asked: Asked,
    device: DeviceMemory,
    dtype: str = "bfloat16",
    *,
    name: str = "the model",
    kept: Mapping[str, str] | None = None,
    stored: Mapping[str, str] | None = None,
    has_kernels: bool = False,
) -> Planned:
    """Divide the memory of the devices that an engine would have.

    Args:
        model: what it serves.
        asked: its options.
        device: what it runs on.
        dtype: of activations, KV and the weights that are not quantised.
        name: of the model, in messages.
        kept: path -> format, of the parameters that stay quantised; None: there are none.
        stored: of those that the files hold quantised, for the remedy of a refusal; None: those that stay.
        has_kernels: whether products of one 16-bit row are as fast as they should be, as on CPUs with our kernels.

    Raises:
        ValueError: the model does not divide by a mesh's tp, or weights, temporaries or the KV of one request do not
            fit; the message shows the arithmetic.
    """
    meshes = asked.parsed_topology.meshes
    for spec in dict.fromkeys(meshes):
        check_tp(model, spec)
    defaults = device.defaults
    if has_kernels:
        defaults = replace(defaults, has_kernels=True)
    config = engine_config(asked, model, defaults, dtype)
    kept = kept or {}
    memory = None if device.bytes is None else _memory(asked, device, device.bytes)

    def fit(meshes: tuple[MeshSpec, ...]) -> Fit:
        return Fit(
            name, model, config, meshes, memory or Memory(0, device.kind), defaults.staging_part, asked.max_model_len,
            kept, kept if stored is None else stored,
        )  # fmt: skip

    if memory is None and asked.kv_cache_bytes is None:
        raise ValueError(f"nobody says how much memory {device.kind} has: give kv_cache_bytes.")
    needs, budgets = _divided(meshes, memory, asked.kv_cache_bytes, fit)
    models = [model_on(model, spec.tp) for spec in meshes]
    config, pools = size_pools(config, models, budgets, defaults.staging_part, asked.max_model_len)
    return Planned(config, tuple(pools), needs, memory)


def _divided(
    meshes: tuple[MeshSpec, ...],
    memory: Memory | None,
    most: int | None,
    fit: Callable[[tuple[MeshSpec, ...]], Fit],
) -> tuple[tuple[Need, ...], list[int]]:
    """Return what each mesh needs, and its bytes for KV and hand-offs; `most` for each, if it is given.

    Raises:
        ValueError: something does not fit.
    """
    if memory is None:
        assert most is not None
        return fit(meshes).needs, [most for _ in meshes]
    if memory.is_host:
        whole = fit(meshes)
        check_fits(whole)
        to_load = sum(need.weight_bytes for need in whole.needs)
        return whole.needs, [host_budget(memory.usable, to_load, len(meshes)) if most is None else most for _ in meshes]
    fits = {spec: fit((spec,)) for spec in dict.fromkeys(meshes)}
    for one in fits.values():
        check_fits(one)
    needs = tuple(fits[spec].needs[0] for spec in meshes)
    left = [(memory.usable - need.total + need.kv) * spec.tp for need, spec in zip(needs, meshes, strict=True)]
    return needs, left if most is None else [min(size, most) for size in left]


def _memory(asked: Asked, device: DeviceMemory, size: int) -> Memory:
    """Return what an engine may take of a device, or of a host."""
    if device.platform == "cpu":
        return Memory(size, f"{gib(size)} of memory that the host has available", is_host=True)
    held = FRACTION if asked.memory_fraction is None else asked.memory_fraction
    usable = free_bytes(Reported(int(held * size), 0), Share(held, asked.memory_fraction))
    return Memory(usable, f"{held:g} of {device.kind}'s {gib(size)}, less {FRAGMENTS:.0%} for gaps")
