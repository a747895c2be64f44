"""The memory plan of an engine on devices that need not be there: its configuration and its pools, or a refusal.

The arithmetic is start-up's own (`sizing/`): the same defaults, the same buckets, the same pages. What start-up asks
devices and files is given here: the kind of device, its memory, and which weights stay quantised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..sizing.asked import Asked
from ..sizing.defaults import Defaults, defaults_for, engine_config
from ..sizing.device_memory import FRACTION, Reported, Share, free_bytes
from ..sizing.heads import check_tp, model_on
from ..sizing.memory_needs import request_bytes, temporary_bytes, transit_bytes
from ..sizing.pools import size_pools
from ..sizing.weight_sizes import weight_bytes
from ..topology import MeshSpec


@dataclass(frozen=True)
class DeviceMemory:
    """A kind of device, as far as its memory goes."""

    kind: str  # as JAX names it, or short, as in "h100"
    bytes: int | None  # of each; None: only `kv_cache_bytes` says what there is, as on CPUs
    platform: str = "gpu"  # as JAX names it

    @property
    def defaults(self) -> Defaults:
        """Return what an engine gets on it where nobody says otherwise."""
        return defaults_for(self.platform, self.kind.upper())


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
    """Return the configuration and the pools that an engine would have.

    Args:
        model: what it serves.
        asked: its options.
        device: what it runs on.
        dtype: of activations, KV and the weights that are not quantised.
        name: of the model, in messages.
        formats: path -> format, of the parameters that stay quantised; None: there are none.
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
    models = {spec: model_on(model, spec.tp) for spec in dict.fromkeys(meshes)}
    budgets = {}
    for spec, on_mesh in models.items():
        weights = weight_bytes(on_mesh, dtype, spec.tp, formats)
        budgets[spec] = _budget(name, on_mesh, weights, asked, config, device, spec)
    config, pools = size_pools(
        config,
        [models[spec] for spec in meshes],
        [budgets[spec] for spec in meshes],
        defaults.staging_part,
        asked.max_model_len,
    )
    return config, tuple(pools)


def _budget(
    name: str,
    on_mesh: ModelConfig,
    weights: int,
    asked: Asked,
    config: EngineConfig,
    device: DeviceMemory,
    spec: MeshSpec,
) -> int:
    """Return the bytes of one mesh for KV pages and staging; `weights`: bytes on each of its devices."""
    most = asked.kv_cache_bytes
    if device.bytes is None:
        if most is None:
            raise ValueError(f"nobody says how much memory {device.kind} has: give kv_cache_bytes.")
        return most
    needs = {
        "weights": weights,
        "request state": request_bytes(on_mesh, config) + transit_bytes(config),
        "temporaries": temporary_bytes(on_mesh, config, spec.tp),
    }
    held = FRACTION if asked.memory_fraction is None else asked.memory_fraction
    share = Share(held, asked.memory_fraction)
    aside = needs["request state"] + needs["temporaries"]
    free = free_bytes(Reported(int(held * device.bytes), needs["weights"]), share) - aside
    if free <= 0:
        raise ValueError(_too_small(name, needs, held, device, spec))
    return free * spec.tp if most is None else min(free * spec.tp, most)


def _too_small(name: str, needs: dict[str, int], held: float, device: DeviceMemory, spec: MeshSpec) -> str:
    assert device.bytes is not None
    parts = " + ".join(f"{size / 2**30:.2f} GiB of {name}" for name, size in needs.items())
    whole = held * device.bytes / 2**30
    return (
        f"{name} does not fit at tp {spec.tp}: each device of the {spec.role} mesh needs {parts} = "
        f"{sum(needs.values()) / 2**30:.2f} GiB before any KV, and {held:g} of {device.kind}'s "
        f"{device.bytes / 2**30:.2f} GiB are {whole:.2f}: raise tp, or lower max_num_seqs or prefill_buckets."
    )
