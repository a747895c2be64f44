"""`topology="auto"`: which meshes to start with, from model, devices and target, with the reason in one line.

The degree of tensor parallelism is the smallest power of two that divides the model and leaves room for a request (the
memory plan, as start-up makes it); the devices then make a pool of such meshes, and what is left over stays idle. With
an SLO the planner moves its roles, for 99 % of requests unless the SLO says otherwise, and the pool begins with those
that are predicted to carry the most of a stated mix of requests, fused where that carries more; without one there is
nothing to plan by, and all meshes do both. CPU devices share the machine's cores and memory: there it is one mesh,
unless devices are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..options import EngineOptions
from ..protocol.service import SLO
from ..scheduler.candidates import candidates
from ..scheduler.observations import Outlook, Pair, Split
from ..simulation.capacity import DeviceMemory, capacity
from ..simulation.costs.devices import peaks_of
from ..simulation.costs.roofline import roofline
from ..simulation.planning.candidates import degrees
from ..simulation.planning.forecast import forecast_splits, steady
from ..simulation.simulator import SimulatedEngine
from ..sizing.device_memory import Share
from ..topology import MeshSpec, Role
from .decision_file import name_of
from .quantization import choose

# The mix of the first roles: prompt and answer in tokens, as Azure's conversations of 2023 have them in the mean.
_PROMPT, _ANSWER = 1155, 211
_FUSED = "pool(mode=fused)"
_RATES = [2.0 ** (power / 2) for power in range(-6, 25)]  # requests a second that are tried, rising


type Sized = tuple[EngineConfig, tuple[PoolSize, ...]]


class Chosen(NamedTuple):
    """What was chosen."""

    options: EngineOptions
    why: str  # in one line


def choose_topology(
    options: EngineOptions,
    model: ModelConfig,
    dtype: str,
    devices: Sequence[jax.Device],
    share: Share,
    formats: Mapping[str, str],
    *,
    is_for_one: bool = False,
) -> Chosen:
    """Replace `topology="auto"` by one for these devices, all alike.

    Args:
        options: the engine's.
        model: what it serves.
        dtype: of activations, KV and the weights that are not quantised.
        devices: those that may be used.
        share: of their memory.
        formats: path -> format, of what the model's files hold quantised.
        is_for_one: whether the engine is for one request, which gets one mesh.

    Raises:
        ValueError: the model fits on no number of them, with the arithmetic of the largest.
    """
    first, count = devices[0], len(devices)
    if first.platform == "cpu" and options.devices is None:
        why = "CPU devices share cores and memory, so one mesh does both"
        return Chosen(replace(options, topology="both=1"), why)
    memory = _memory(first, share)
    tp, sized = _smallest(options, model, dtype, memory, formats, count)
    meshes = 1 if is_for_one else count // tp
    left_over = "" if is_for_one or count % tp == 0 else f" and leaves {count % tp} of them idle"
    fits = f"{count} x {first.device_kind}, {name_of(options.model)} fits at tp {tp}{left_over}"
    given = None if options.devices is None else options.devices[: meshes * tp]
    if meshes == 1:
        one = replace(options, topology=_named("both", 1, tp), devices=given)
        return Chosen(one, f"{fits}: one mesh, so it does both")
    pooled = replace(options, topology=_named("pool", meshes, tp), devices=given)
    if options.slo is None:
        return Chosen(pooled, f"{fits}; without an SLO there is nothing to plan by: all do both")
    slo = options.slo.with_percentile()
    wanted = replace(pooled, slo=slo)
    peaks = peaks_of(first.device_kind)
    if sized is None or peaks is None:
        return Chosen(wanted, f"{fits}; nothing is known of such a device's speed, so all do both until it is measured")
    rate, best = _first_roles(SimulatedEngine(*sized, roofline(model, sized[0], peaks)), slo)
    fused = _fused(options, model, dtype, memory, formats, (meshes, tp))
    if fused is not None:
        rate_fused, best_fused = _first_roles(SimulatedEngine(*fused, roofline(model, fused[0], peaks)), slo)
        if best_fused is not None and rate_fused > rate:
            rate, best, wanted = rate_fused, best_fused, replace(wanted, topology=_named(_FUSED, meshes, tp))
    mix = f"prompts of {_PROMPT} and answers of {_ANSWER} tokens"
    if best is None:
        return Chosen(wanted, f"{fits}; no roles are predicted to meet the target with {mix}: all do both")
    why = f"{fits}; {best.roles} is predicted to carry the most {mix}, {rate:.3g} a second; demand then moves the roles"
    return Chosen(replace(wanted, roles=str(best.roles)), why)


def _named(role: str, meshes: int, tp: int) -> str:
    return f"{role}={meshes}" + (f"xtp{tp}" if tp > 1 else "")


def _memory(device: jax.Device, share: Share) -> DeviceMemory:
    """Return what a device has, of which JAX's allocator holds a part; None: it does not say, as CPUs."""
    stats = device.memory_stats()
    size = None if stats is None else int(stats["bytes_limit"] / share.held)
    return DeviceMemory(device.device_kind, size, device.platform)


def _smallest(
    options: EngineOptions,
    model: ModelConfig,
    dtype: str,
    memory: DeviceMemory,
    formats: Mapping[str, str],
    count: int,
) -> tuple[int, Sized | None]:
    """Find the smallest tp at which the model fits, and the sizes of such meshes; None: nobody knows how much memory
    there is, and start-up will see."""
    refusals, name = list[ValueError](), name_of(options.model)
    for tp in degrees(model, count):
        meshes = count // tp
        asked = replace(options, topology=_named("pool" if meshes > 1 else "both", meshes, tp))
        if memory.bytes is None and options.kv_cache_bytes is None:
            return tp, None
        kept = choose(
            options.quantization, formats, model, memory.platform, [MeshSpec(Role.BOTH, tp)], options.activations
        ).kept
        try:
            return tp, capacity(model, asked, memory, dtype, name=name, formats=kept)
        except ValueError as error:
            refusals.append(error)
    raise refusals[-1]


def _fused(
    options: EngineOptions,
    model: ModelConfig,
    dtype: str,
    memory: DeviceMemory,
    formats: Mapping[str, str],
    shape: tuple[int, int],
) -> Sized | None:
    """Return the sizes of so many meshes of this tp that are fused where they do both; None: there can be none."""
    if options.deterministic:
        return None
    kept = choose(
        options.quantization, formats, model, memory.platform, [MeshSpec(Role.BOTH, shape[1])], options.activations
    ).kept
    asked = replace(options, topology=_named(_FUSED, *shape))
    try:
        return capacity(model, asked, memory, dtype, name=name_of(options.model), formats=kept)
    except ValueError:
        return None


def _first_roles(engine: SimulatedEngine, slo: SLO) -> tuple[float, Outlook | None]:
    """Find the highest rate of the mix at which some split meets the target, and the best split there."""
    meshes = len(engine.config.topology.meshes)
    splits, found, at = candidates(Split(0, 0, meshes)), None, 0.0
    assert slo.percentile is not None
    for rate in _RATES:
        demand = steady(rate * meshes, [Pair(_PROMPT, _PROMPT, _ANSWER)])
        best = max(forecast_splits(demand, engine, slo, splits), key=lambda outlook: outlook.value)
        if best.goodput < slo.percentile / 100:
            break
        found, at = best, rate * meshes
    return at, found
