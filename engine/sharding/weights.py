"""Loads a model's parameters onto meshes at start-up, and replaces them while the engine runs.

A parameter is named by its dotted path (`AbstractParams.specs`) and has, to callers, the shape of the checkpoint's
model. Only this file knows the layout on a mesh, with key/value heads repeated where there are more devices than heads.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import ArrayLike
from tqdm import tqdm

from ...models.checkpoints.base import Checkpoint
from ...models.config import ModelConfig
from ...models.decoder import ParamSpec, abstract_params
from .mesh import param_sharding
from .tensor_parallel import expand, model_on

# A model's parameters on one mesh, in the order of `AbstractParams.specs`.
type Params = tuple[jax.Array, ...]


def load_weights(checkpoint: Checkpoint, dtype: jnp.dtype, meshes: Sequence[Mesh], progress: bool) -> list[Params]:
    """Load a tuple of arrays per mesh, reading and dequantising each tensor once; `progress` shows a bar on stderr."""
    placers = [Placer(checkpoint.config, dtype, mesh) for mesh in meshes]
    wanted = {path: tuple(placer.wanted(path) for placer in placers) for path in placers[0].specs}
    loaded: list[dict[str, jax.Array]] = [{} for _ in meshes]
    total = sum(math.prod(place.shape) * place.dtype.itemsize for places in wanted.values() for place in places)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, arrays in checkpoint.load(wanted):
            for placer, params, array in zip(placers, loaded, arrays, strict=True):
                params[path] = placer.put(path, array)
                bar.update(array.nbytes)
    return [tuple(params[path] for path in wanted) for params in loaded]


class Placer:
    """What puts parameters of one checkpoint's model on one mesh."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> None:
        self._model, self._mesh = model, mesh
        self.specs: Mapping[str, ParamSpec] = abstract_params(model, dtype).specs
        self._layout = abstract_params(model_on(model, mesh.size), dtype).specs

    def wanted(self, path: str) -> jax.ShapeDtypeStruct:
        """Describe how a checkpoint is to load the parameter before `put`: the checkpoint's shape, and a sharding.

        Where the mesh's layout has another shape, the parameter is to be loaded whole onto one device.
        """
        value, sharding = self.specs[path].value, param_sharding(self._mesh, self.specs[path])
        if self._is_repeated(path):
            return jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=SingleDeviceSharding(self._mesh.devices.flat[0])
            )
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    def put(self, path: str, array: ArrayLike) -> jax.Array:
        """Put the parameter on the mesh in the mesh's layout; `array` may be on the host, this mesh or another one."""
        target = param_sharding(self._mesh, self._layout[path])
        if not self._is_repeated(path):
            placed: jax.Array = jax.device_put(array, target)
            return placed
        host, axes = np.asarray(array), self.specs[path].axes

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return expand(host, axes, self._model, self._mesh.size, index)

        return jax.make_array_from_callback(self._layout[path].value.shape, target, shard)

    def _is_repeated(self, path: str) -> bool:
        return tuple(self._layout[path].value.shape) != tuple(self.specs[path].value.shape)

    def replace(self, params: list[jax.Array], new: Mapping[str, ArrayLike]) -> None:
        """Replace the parameters named in `new` one by one, so that each old array can be freed before the next."""
        for index, path in enumerate(self.specs):
            if path in new:
                params[index] = self.put(path, new[path])

    def check(self, new: Mapping[str, ArrayLike]) -> None:
        """Refuse names that are no parameters, and arrays of another shape or dtype.

        Raises:
            ValueError: names the parameter and what was expected.
        """
        for path, array in new.items():
            if path not in self.specs:
                known = next(iter(self.specs))
                raise ValueError(f"params names {path!r}, which the model does not have: use paths such as {known!r}.")
            value, shape, dtype = self.specs[path].value, np.shape(array), jnp.result_type(array)
            if shape != value.shape or dtype != value.dtype:
                raise ValueError(
                    f"params[{path!r}] is {dtype}{list(shape)}: it must be {value.dtype}{list(value.shape)}, as before."
                )
