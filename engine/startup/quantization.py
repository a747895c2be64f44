"""Which weights stay quantised, and the lines that say so when an engine starts.

Invariant: the choice is a pure function of the option, the files, the meshes' sizes and what kernels there are for this
kind of device, so that every start on a machine makes the same one, and the same for all meshes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ...kernels_pallas.block_tiles import OUTPUTS
from ...kernels_pallas.cpu import blocks, calls, stacks
from ...kernels_pallas.cpu.blocks_records import Activations
from ...kernels_pallas.matmul import kernel_for
from ...kernels_pallas.quantized import QuantizedArray
from ...models.checkpoints.base import Checkpoint
from ...models.checkpoints.streaming import Packed
from ...models.config import ModelConfig
from ...models.decoder import abstract_params
from ...models.quantized import nbytes
from ..config import QUANTIZATIONS, ROUNDINGS
from ..kv_dtypes import KVDtypes
from ..sharding.mesh import abstract_mesh, products_on
from ..sizing.heads import model_on
from ..topology import MeshSpec
from ..worker.kv_cache import jax_dtype

_KV_SCALES_LINE = (
    "KV: the checkpoint's own scales of keys and values (k_scale, v_scale) are not needed: in 8 bits every token and "
    "head has a scale here, in which one of a whole layer would cancel out"
)


@dataclass(frozen=True)
class Quantized:
    """What the files hold quantised, what stays so, and why the rest does not."""

    stored: Mapping[str, str]  # path of every such parameter -> its format
    kept: Mapping[str, str]  # those that stay
    platform: str  # of the devices
    activations: Activations
    reasons: tuple[str, ...] = ()  # why others do not
    lost_bytes: int = 0  # that these others take quantised
    lost_numbers: int = 0  # that they hold

    @property
    def formats(self) -> tuple[str, ...]:
        """Return the formats that stay, the most frequent first."""
        return tuple(name for name, _ in Counter(self.kept.values()).most_common())


def asked_of(asked: str | None, method: str | None, name: str) -> str:
    """Return which of `QUANTIZATIONS` is asked for; a method's name asks for what the checkpoint is anyway.

    Args:
        asked: `EngineOptions.quantization`.
        method: that quantised the checkpoint, or None.
        name: the checkpoint's.

    Raises:
        ValueError: the checkpoint is quantised by another method, or by none.
    """
    if asked is None or asked == method:
        return "auto"
    if asked in QUANTIZATIONS:
        return asked
    found = "is not quantised" if method is None else f"is quantised by {method}"
    write = (
        f", or write a copy with twinmesh convert --quantize {asked}" if asked in ROUNDINGS and method is None else ""
    )
    raise ValueError(f"quantization={asked!r} is not usable: {name} {found}; leave it out{write}.")


def choose(
    asked: str | None,
    stored: Mapping[str, str],
    model: ModelConfig,
    platform: str,
    meshes: Sequence[MeshSpec],
    activations: Activations,
    kind: str | None = None,
) -> Quantized:
    """Choose the parameters that stay quantised.

    Args:
        asked: one of `QUANTIZATIONS`; None or a method's name: as "auto".
        stored: path -> format, of what the files hold quantised (`Checkpoint.formats`).
        model: the checkpoint's.
        platform: of the engine's devices, as JAX names it.
        meshes: of the engine.
        activations: what kernels are to multiply by.
        kind: of a GPU that is planned for and need not be there; None: the devices are here.
    """
    if asked == "none":
        reasons = ("quantization='none'",) if stored else ()
        return Quantized(stored, {}, platform, activations, reasons, *_sizes(stored, model))
    lacking = {name for name in set(stored.values()) if kernel_for(platform, name, kind) is None}
    fast = stored if asked == "keep" else {path: name for path, name in stored.items() if name not in lacking}
    why_slow = (f"no kernel multiplies by {_listed(sorted(lacking))} here",) if len(fast) < len(stored) else ()
    cut = {path: reason for mesh in map(abstract_mesh, meshes) for path, reason in _cut(fast, model, mesh).items()}
    kept = {path: name for path, name in fast.items() if path not in cut}
    lost = {path: name for path, name in stored.items() if path not in kept}
    reasons = (*why_slow, *dict.fromkeys(cut.values()))
    return Quantized(stored, kept, platform, activations, reasons, *_sizes(lost, model))


def _sizes(formats: Mapping[str, str], model: ModelConfig) -> tuple[int, int]:
    """Return the bytes that parameters take in their formats, and how many numbers they hold."""
    specs = abstract_params(model, jnp.float32, formats).specs
    values = [specs[path].value for path in formats]
    return sum(map(nbytes, values)), sum(math.prod(value.shape) for value in values)


def _cut(formats: Mapping[str, str], model: ModelConfig, mesh: AbstractMesh) -> dict[str, str]:
    """Find the parameters that cannot be divided over a mesh, by path, each with a reason."""
    products, found, tp = products_on(mesh), dict[str, str](), mesh.size
    if tp == 1:
        return found
    specs = abstract_params(model_on(model, tp), jnp.float32, formats).specs
    for path in formats:
        value, name = specs[path].value, path.rpartition(".")[2]
        assert isinstance(value, QuantizedArray)
        reason = products.cut(products.split(specs[path].axes, value), value)
        repeats_heads = "kv_heads" in specs[path].axes and model.num_kv_heads < tp
        if repeats_heads and model.head_dim % OUTPUTS:
            reason = f"heads of {model.head_dim} that are repeated are no multiple of {OUTPUTS}, which tiles have"
        if reason is not None:
            found[path] = f"of {name}, {reason}{_whole_experts(model, tp, value)}"
    return found


def _whole_experts(model: ModelConfig, tp: int, value: QuantizedArray) -> str:
    """Say how the devices of a mesh would hold whole matrices of a stack instead of parts; empty: they cannot."""
    divides = value.stacked and model.experts is not None and model.experts.count % tp == 0
    return f" (xtp{tp}ep{tp} divides whole experts)" if divides else ""


def cpu_kernels(model: ModelConfig, dtype: jnp.dtype, quantized: Quantized, kv: KVDtypes) -> list[str]:
    """Name the CPU kernels that the model's steps may call."""
    pages = [(jax_dtype(one.k), jax_dtype(one.v)) for one in dict.fromkeys((kv.prefill, kv.decode))]
    specs = abstract_params(model, dtype, quantized.kept).specs.values()
    matrices = (spec.value for spec in specs if len(spec.axes) > 1 and "embed" in spec.axes)  # neither norms nor biases
    has_matrices = any(not isinstance(value, QuantizedArray) for value in matrices)
    own = calls.kernels_of(dtype, pages, model.head_dim, has_matrices=has_matrices)
    own += blocks.kernels_of(quantized.formats, quantized.activations)
    if model.experts is None:
        return own
    # An expert's matrix may be quantised in one layer and floats in another: few models, and a kernel compiles once.
    return own + stacks.kernels_of(dtype, quantized.formats, quantized.activations)


def start_line(weights: Quantized, dtype: str, kv: KVDtypes | None = None) -> str:
    """Say what weights are stored as, what multiplies them, and what activations and KV are; `kv` where it differs."""
    parts, rounds = [], False
    for name, count in Counter(weights.kept.values()).most_common():
        level = kernel_for(weights.platform, name)
        parts.append(f"{count} {name} ({level or 'XLA, a part at a time as floats'})")
        rounds |= level is not None and weights.activations != "float"
    lost = Counter(weights.stored.values()) - Counter(weights.kept.values())
    if lost:
        shown = _listed(f"{count} {name}" for name, count in lost.most_common())
        made = weights.lost_numbers * jnp.dtype(dtype).itemsize
        cost = f"{weights.lost_bytes / 1e6:,.0f} MB become {made / 1e6:,.0f} MB"
        parts.append(f"{shown} dequantised to {dtype}: {'; '.join(weights.reasons)}; {cost}")
    parts.append(f"all else {dtype}" if parts else f"all {dtype}")
    rounded = f", rounded to {weights.activations} where quantised weights multiply them" if rounds else ""
    if kv is None:
        return f"weights: {', '.join(parts)}; activations and KV: {dtype}{rounded}"
    scaled = ", with a scale for each token and head of 8-bit numbers" if kv.is_quantized else ""
    return f"weights: {', '.join(parts)}; activations: {dtype}{rounded}; KV: {kv}{scaled}"


def dequantized_line(packed: Mapping[str, Packed], model: ModelConfig, dtype: jnp.dtype) -> str:
    """Say what the files hold quantised that becomes floats in any case, and what that costs."""
    specs = abstract_params(model, dtype).specs
    stored = sum(one.nbytes for one in packed.values())
    made = sum(nbytes(specs[path].value) for path in packed)
    shown = _listed(f"{count} {name}" for name, count in Counter(one.format for one in packed.values()).most_common())
    return (
        f"weights: {shown} dequantised to {dtype.name} as they are loaded: no product takes them as they are; "
        f"{stored / 1e6:,.0f} MB of the files become {made / 1e6:,.0f} MB"
    )


def file_lines(checkpoint: Checkpoint, dtype: jnp.dtype) -> Iterator[str]:
    """Say, a line each, what the files hold that an engine does not take as it is there; `dtype` is that of floats."""
    if checkpoint.dequantized:
        yield dequantized_line(checkpoint.dequantized, checkpoint.config, dtype)
    if checkpoint.method is not None and checkpoint.rounds_activations:
        yield _activations_line(checkpoint.method)
    if checkpoint.has_kv_scales:
        yield _KV_SCALES_LINE


def _activations_line(method: str) -> str:
    """Say that activations are not quantised where the checkpoint's method would quantise them."""
    return (
        f"weights: {method} would have activations quantised as well; they are not, so results are nearer those of the "
        "floats, and weights are what is saved"
    )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
