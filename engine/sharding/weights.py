"""Loads a model's parameters onto meshes at start-up, and replaces them while the engine runs.

A parameter is named by its dotted path (`AbstractParams.specs`) and has, to callers, the shape of the checkpoint's
model. Only this file knows the layout on a mesh, with key/value heads repeated where there are more devices than heads.
A parameter that is quantised stays so for good, in its format: programs are compiled for it.

CPU devices have one memory. Invariants there: meshes of one device hold the same bytes of every parameter, whatever
kind of checkpoint they come from and after `Placer.put` of new ones; no parameter lies in memory that a caller of the
engine can write to or donate. Steps never have parameters donated, which would write over what others hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import ArrayLike

from ...kernels_pallas.quantized import QuantizedArray
from ...models.checkpoints.base import Checkpoint
from ...models.checkpoints.host_memory import FileMaps, aligned_empty
from ...models.config import ModelConfig
from ...models.decoder import ParamSpec, abstract_params
from ...models.placing import put
from ...models.quantized import Described, Weight, placed
from ..host.progress import Progress
from ..sizing.heads import model_on
from .mesh import param_on, param_sharding
from .tensor_parallel import expand

# A model's parameters on one mesh, in the order of `AbstractParams.specs`.
type Params = tuple[Weight, ...]
# A parameter that takes the place of another.
type NewParam = ArrayLike | QuantizedArray


def load_weights(
    checkpoint: Checkpoint,
    dtype: jnp.dtype,
    meshes: Sequence[Mesh],
    formats: Mapping[str, str] | None = None,
    *,
    progress: bool,
    allow_nonfinite: bool = False,
    maps: FileMaps | None = None,
) -> list[Params]:
    """Load a tuple of parameters per mesh, reading each tensor once; `progress` shows on stderr how much is read.

    `formats` are those that stay quantised, of `checkpoint.formats`; all others become arrays of `dtype`. `maps` takes
    the files of which CPUs use parts where they are; None: everything is read. Raises as `Checkpoint.load` does.
    """
    placers = [Placer(checkpoint.config, dtype, mesh, formats) for mesh in meshes]
    lenders = _lenders(meshes)
    asked = sorted(set(lenders))
    wanted = {path: tuple(placers[index].wanted(path) for index in asked) for path in placers[0].specs}
    loaded: list[dict[str, Weight]] = [{} for _ in meshes]
    with Progress("weights", checkpoint.stored_bytes, "B", shown=progress) as line:
        for path, arrays in checkpoint.load(wanted, allow_nonfinite=allow_nonfinite, maps=maps, report=line.advance):
            by_mesh = dict(zip(asked, arrays, strict=True))
            for placer, params, lender in zip(placers, loaded, lenders, strict=True):
                params[path] = placer.put(path, by_mesh[lender])
    return [tuple(params[path] for path in wanted) for params in loaded]


def _lenders(meshes: Sequence[Mesh]) -> list[int]:
    """Return for each mesh the index of the one whose arrays it shares: the first CPU mesh of one device, or itself."""
    first = next((index for index, mesh in enumerate(meshes) if _is_one_cpu(mesh)), None)
    return [first if first is not None and _is_one_cpu(mesh) else index for index, mesh in enumerate(meshes)]


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


class Placer:
    """What puts parameters of one checkpoint's model on one mesh."""

    def __init__(
        self, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh, formats: Mapping[str, str] | None = None
    ) -> None:
        self._model, self._mesh = model, mesh
        self.specs: Mapping[str, ParamSpec] = abstract_params(model, dtype, formats).specs
        self._layout = abstract_params(model_on(model, mesh.size), dtype, formats).specs

    def wanted(self, path: str) -> Described:
        """Describe how a checkpoint is to load the parameter before `put`: the checkpoint's shape, and a sharding.

        Where the mesh's layout has another shape, the parameter is to be loaded whole onto one device, of this process.
        """
        if self._is_repeated(path):
            first = SingleDeviceSharding(self._mesh.local_devices[0])
            return placed(self.specs[path].value, lambda _: first)
        return param_on(self._mesh, self.specs[path])

    def put(self, path: str, parameter: NewParam, *, is_shared: bool = True) -> Weight:
        """Put it on the mesh in the mesh's layout; its arrays may be on the host, this mesh or another one.

        A CPU mesh of one device takes an array where it is, if it is aligned and on the host or on any one CPU device;
        so does any mesh that it is on already. Such an array must not be written to or donated later. `is_shared`:
        False for one that may be, on GPUs; CPUs take a `private_copy`.
        """
        if isinstance(parameter, QuantizedArray):
            return self._put_quantized(path, parameter, is_shared=is_shared)
        target = param_sharding(self._mesh, self._layout[path])
        if not self._is_repeated(path):
            return self._put(parameter, target, is_shared=is_shared)
        host, axes = np.asarray(parameter), self.specs[path].axes

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return expand(host, axes, self._model, self._mesh.size, index)

        return jax.make_array_from_callback(self._layout[path].value.shape, target, shard)

    def _put_quantized(self, path: str, parameter: QuantizedArray, *, is_shared: bool) -> QuantizedArray:
        repeated, like = self._is_repeated(path), param_on(self._mesh, self._layout[path])

        def put(array: ArrayLike, like: jax.ShapeDtypeStruct) -> jax.Array:
            if repeated:
                heads = np.asarray(array).reshape(self._model.num_kv_heads, -1)  # whole tiles each
                expanded = expand(heads, ("kv_heads", "rest"), self._model, self._mesh.size)
                array = expanded.reshape(like.shape)
            return self._put(array, like.sharding, is_shared=is_shared)

        assert isinstance(like, QuantizedArray)
        places = dict(like.parts())
        return like.with_parts({name: put(array, places[name]) for name, array in parameter.parts()})

    def _put(self, array: ArrayLike, sharding: Any, *, is_shared: bool) -> jax.Array:
        source = _on_host(array) if _is_one_cpu(self._mesh) else array
        return put(source, sharding, may_alias=None if is_shared else False)

    @property
    def is_on_cpus(self) -> bool:
        """Whether the mesh's devices are CPUs, which all have one memory."""
        return bool(self._mesh.devices.flat[0].platform == "cpu")

    def private_copy(self, path: str, parameter: NewParam) -> NewParam:
        """Copy a caller's parameter, which may be written to or donated later, for `put` on every CPU mesh."""

        def copy(array: ArrayLike, like: jax.ShapeDtypeStruct) -> np.ndarray:
            host = aligned_empty(like.shape, like.dtype)
            host[...] = np.asarray(array)
            return host

        copied: NewParam = jax.tree.map(copy, parameter, self.specs[path].value)
        return copied

    def _is_repeated(self, path: str) -> bool:
        return tuple(self._layout[path].value.shape) != tuple(self.specs[path].value.shape)

    def check(self, new: Mapping[str, NewParam]) -> None:
        """Refuse names that are no parameters, and arrays of another shape, dtype or format.

        Raises:
            ValueError: names the parameter and what was expected.
        """
        check_params(self.specs, new)


def check_params(specs: Mapping[str, ParamSpec], new: Mapping[str, NewParam]) -> None:
    """Refuse names that are not in `specs`, and arrays of another shape, dtype or format; needs no device.

    Raises:
        ValueError: names the parameter and what was expected.
    """
    for path, parameter in new.items():
        if path not in specs:
            known = next(iter(specs))
            raise ValueError(f"params names {path!r}, which the model does not have: use paths such as {known!r}.")
        wanted = specs[path].value
        difference = _difference(f"params[{path!r}]", parameter, wanted)
        if difference is None:
            continue
        if isinstance(wanted, QuantizedArray) and not isinstance(parameter, QuantizedArray):
            difference += (
                "; round it with `quantize` of twinmesh.models.quantized, or start the engine with "
                "quantization='none' to give floats"
            )
        raise ValueError(f"{difference}.")


def _difference(name: str, given: NewParam, wanted: Described) -> str | None:
    """Say how a parameter differs from what it has to be; None: it does not."""
    if _described(given) != _described(wanted):
        return f"{name} is {_described(given)}: it must be {_described(wanted)}, as before"
    if not isinstance(given, QuantizedArray) or not isinstance(wanted, QuantizedArray):
        return None
    if (given.inputs, given.stacked) != (wanted.inputs, wanted.stacked):
        had, needed = (f"{w.stacked} and {w.inputs}" for w in (given, wanted))
        return f"{name} has {had} axes of matrices and inputs: it must have {needed}, as before"
    parts, expected = dict(given.parts()), dict(wanted.parts())
    if parts.keys() != expected.keys():
        return f"{name} has {' and '.join(parts)}: it must have {' and '.join(expected)}, as before"
    found = (_difference(f"{name}.{part}", parts[part], like) for part, like in expected.items())
    return next((difference for difference in found if difference is not None), None)


def _described(parameter: NewParam | Described) -> str:
    """Describe a parameter by its format or dtype, and its shape."""
    if isinstance(parameter, QuantizedArray):
        return f"{parameter.format}{list(parameter.shape)}"
    dtype = parameter.dtype if isinstance(parameter, jax.ShapeDtypeStruct) else jnp.result_type(parameter)
    return f"{dtype}{list(np.shape(parameter))}"


def _on_host(array: ArrayLike) -> ArrayLike:
    """Return an array of one CPU device as the host sees it, which is the same memory; anything else as it is."""
    if isinstance(array, jax.Array) and array.sharding.num_devices == 1:
        devices: list[Any] = list(array.sharding.device_set)
        return np.asarray(array) if devices[0].platform == "cpu" else array
    return array


def replace(placers: Sequence[Placer], params: Sequence[list[Weight]], new: Mapping[str, NewParam]) -> None:
    """Replace the parameters named in `new`, of each mesh in `params`.

    One after the other, and on all meshes before the next, so that each old array can be freed first.
    """
    for index, path in enumerate(placers[0].specs):
        if path not in new:
            continue
        is_copied = placers[0].is_on_cpus
        array = placers[0].private_copy(path, new[path]) if is_copied else new[path]
        for placer, mesh in zip(placers, params, strict=True):
            mesh[index] = placer.put(path, array, is_shared=is_copied)


class Held(NamedTuple):
    """The host memory that weights on CPU devices take, in bytes."""

    mapped: int  # pages of files
    copied: int  # the process's own
    spared: int  # what meshes would take besides if each had its own

    def __str__(self) -> str:
        """Say it in a line."""
        mapped, copied, spared = (f"{size / 1e6:,.0f} MB" for size in self)
        shared = f", shared between meshes, which spares {spared}" if self.spared else ""
        return f"{mapped} mapped from the file and {copied} copied{shared}"


def held(params: Sequence[Params], maps: FileMaps | None) -> Held:
    """Count what the weights on CPU devices take, by the addresses at which they lie."""
    seen, mapped, copied, spared = set[int](), 0, 0, 0
    for shard in (shard for array in jax.tree.leaves(list(params)) for shard in array.addressable_shards):
        address, size = shard.data.unsafe_buffer_pointer(), shard.data.nbytes
        if address in seen:
            spared += size
        elif maps is not None and maps.holds(address):
            mapped += size
        else:
            copied += size
        seen.add(address)
    return Held(mapped, copied, spared)
