"""Loads a model's parameters onto meshes at start-up, and replaces them while the engine runs.

A parameter is named by its dotted path (`AbstractParams.specs`) and has, to callers, the shape of the checkpoint's
model. Only this file knows the layout on a mesh, with key/value heads repeated where there are more devices than heads.
A parameter that is quantised stays so for good, in its format: programs are compiled for it.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import ArrayLike
from tqdm import tqdm

from ...kernels_pallas.quantized import QuantizedArray
from ...models.checkpoints.base import Checkpoint
from ...models.config import ModelConfig
from ...models.decoder import ParamSpec, abstract_params
from ...models.quantized import Described, Weight, placed
from .mesh import param_on, param_sharding
from .tensor_parallel import expand, model_on

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
) -> list[Params]:
    """Load a tuple of parameters per mesh, reading each tensor once; `progress` shows a bar on stderr.

    `formats` are those that stay quantised, of `checkpoint.formats`; all others become arrays of `dtype`. Raises as
    `Checkpoint.load` does.
    """
    placers = [Placer(checkpoint.config, dtype, mesh, formats) for mesh in meshes]
    wanted = {path: tuple(placer.wanted(path) for placer in placers) for path in placers[0].specs}
    loaded: list[dict[str, Weight]] = [{} for _ in meshes]
    arrays = jax.tree.leaves(list(wanted.values()))
    total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, parameters in checkpoint.load(wanted, allow_nonfinite=allow_nonfinite):
            for placer, params, parameter in zip(placers, loaded, parameters, strict=True):
                params[path] = placer.put(path, parameter)
                bar.update(parameter.nbytes)
    return [tuple(params[path] for path in wanted) for params in loaded]


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

        Where the mesh's layout has another shape, the parameter is to be loaded whole onto one device.
        """
        if self._is_repeated(path):
            first = SingleDeviceSharding(self._mesh.devices.flat[0])
            return placed(self.specs[path].value, lambda _: first)
        return param_on(self._mesh, self.specs[path])

    def put(self, path: str, parameter: NewParam) -> Weight:
        """Put it on the mesh in the mesh's layout; it may be on the host, this mesh or another one."""
        if isinstance(parameter, QuantizedArray):
            return self._put_quantized(path, parameter)
        target = param_sharding(self._mesh, self._layout[path])
        if not self._is_repeated(path):
            put: jax.Array = jax.device_put(parameter, target)
            return put
        host, axes = np.asarray(parameter), self.specs[path].axes

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return expand(host, axes, self._model, self._mesh.size, index)

        return jax.make_array_from_callback(self._layout[path].value.shape, target, shard)

    def _put_quantized(self, path: str, parameter: QuantizedArray) -> QuantizedArray:
        repeated, like = self._is_repeated(path), param_on(self._mesh, self._layout[path])

        def put(array: ArrayLike, like: jax.ShapeDtypeStruct) -> jax.Array:
            if repeated:
                heads = np.asarray(array).reshape(self._model.num_kv_heads, -1)  # whole tiles each
                expanded = expand(heads, ("kv_heads", "rest"), self._model, self._mesh.size)
                array = expanded.reshape(like.shape)
            placed: jax.Array = jax.device_put(array, like.sharding)
            return placed

        assert isinstance(like, QuantizedArray)
        places = dict(like.parts())
        return like.with_parts({name: put(array, places[name]) for name, array in parameter.parts()})

    def _is_repeated(self, path: str) -> bool:
        return tuple(self._layout[path].value.shape) != tuple(self.specs[path].value.shape)

    def replace(self, params: list[Weight], new: Mapping[str, NewParam]) -> None:
        """Replace the parameters named in `new` one by one, so that each old array can be freed before the next."""
        for index, path in enumerate(self.specs):
            if path in new:
                params[index] = self.put(path, new[path])

    def check(self, new: Mapping[str, NewParam]) -> None:
        """Refuse names that are no parameters, and arrays of another shape, dtype or format.

        Raises:
            ValueError: names the parameter and what was expected.
        """
        for path, parameter in new.items():
            if path not in self.specs:
                known = next(iter(self.specs))
                raise ValueError(f"params names {path!r}, which the model does not have: use paths such as {known!r}.")
            wanted = self.specs[path].value
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
    parts = dict(given.parts())
    found = (_difference(f"{name}.{part}", parts.get(part, 0), like) for part, like in wanted.parts())
    return next((difference for difference in found if difference is not None), None)


def _described(parameter: NewParam | Described) -> str:
    """Describe a parameter by its format or dtype, and its shape."""
    if isinstance(parameter, QuantizedArray):
        return f"{parameter.format}{list(parameter.shape)}"
    dtype = parameter.dtype if isinstance(parameter, jax.ShapeDtypeStruct) else jnp.result_type(parameter)
    return f"{dtype}{list(np.shape(parameter))}"
