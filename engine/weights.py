"""A model's parameters on meshes: loaded once at start-up, and put in place of each other while the engine lives.

A parameter is named by its dotted path (`AbstractParams.specs`) and has, to the outside, the shape of the checkpoint's
model; how a mesh lays it out, with key/value heads repeated where there are more devices than heads, shows only here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from tqdm import tqdm

from ..models.checkpoint import Checkpoint, load_params
from ..models.config import ModelConfig
from ..models.decoder import ParamSpec, abstract_params
from .mesh import param_sharding
from .tensor_parallel import expand, model_on

# A model's parameters on one mesh, in the order of `AbstractParams.specs`.
type Params = tuple[jax.Array, ...]


def load_weights(checkpoint: Checkpoint, dtype: jnp.dtype, meshes: Sequence[Mesh], progress: bool) -> list[Params]:
    """One tuple of arrays per mesh; each tensor is read and dequantised once. `progress` shows a bar on stderr."""
    placers = [Placer(checkpoint.config, dtype, mesh) for mesh in meshes]

    def put(path: str, array: np.ndarray) -> tuple[jax.Array, ...]:
        return tuple(placer.put(path, array) for placer in placers)

    bar: Callable[[Iterable[str]], Iterable[str]] = partial(tqdm, desc="weights", disable=not progress)
    return list(zip(*load_params(checkpoint, dtype, put, progress=bar), strict=True))


class Placer:
    """Puts parameters of one model on one mesh."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> None:
        """`model` is the checkpoint's."""
        self._model, self._mesh = model, mesh
        self.specs: Mapping[str, ParamSpec] = abstract_params(model, dtype).specs
        self._layout = abstract_params(model_on(model, mesh.size), dtype).specs

    def put(self, path: str, array: ArrayLike) -> jax.Array:
        """The parameter on the mesh, in the mesh's layout. A `jax.Array` need not be on the host, or on this mesh."""
        axes, target = self.specs[path].axes, param_sharding(self._mesh, self._layout[path])
        if self._layout[path].value.shape != self.specs[path].value.shape:
            array = expand(np.asarray(array), axes, self._model, self._mesh.size)
        placed: jax.Array = jax.device_put(array, target)
        return placed

    def replace(self, params: list[jax.Array], new: Mapping[str, ArrayLike]) -> None:
        """Put those named in `new` in place of the old ones, one by one: each old one can be freed before the next."""
        for index, path in enumerate(self.specs):
            if path in new:
                params[index] = self.put(path, new[path])

    def check(self, new: Mapping[str, ArrayLike]) -> None:
        """Refuse what is not a parameter, or has another shape or dtype.

        Raises:
            ValueError: in one sentence.
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
