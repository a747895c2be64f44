"""Parameters as callers give them to `update_params`, made ready for the executor: arrays, under the model's names.

Arrays may be JAX's, numpy's, or those of any library that hands them over by DLPack or `__array__`, such as torch,
which is not imported. What the executor refuses is not looked at here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ...kernels_pallas.quantized import QuantizedArray
from ...models.checkpoints.state_dict import PREFIXES, from_state_dict
from ..core.engine_core import EngineCore
from .research import local


def named_params(params: Mapping[str, Any], core: EngineCore) -> dict[str, Any]:
    """Turn parameters into arrays by the model's own names.

    Raises:
        ValueError: not a mapping, something that is no array, or a name of Hugging Face's that cannot be used.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"params is of type {type(params).__name__}: give a dict of arrays by parameter name.")
    arrays = {name: as_array(name, value) for name, value in params.items()}
    foreign = {name: value for name, value in arrays.items() if str(name).startswith(PREFIXES)}
    if not foreign:
        return arrays
    quantized = next((name for name, value in foreign.items() if isinstance(value, QuantizedArray)), None)
    if quantized is not None:
        raise ValueError(f"params[{quantized!r}] is quantised: give it under the name that parameters() lists.")

    def describe(_: object, executor: object) -> tuple[Any, Any]:
        found = local(executor, f"params[{next(iter(foreign))!r}]")
        return found.meshes[0].plan.model, found.specs

    model, specs = core.inspect(describe)
    made = from_state_dict(foreign, model, {path: spec.value for path, spec in specs.items()})
    own = {name: value for name, value in arrays.items() if name not in foreign}
    twice = next((path for path in made if path in own), None)
    if twice is not None:
        raise ValueError(f"params has {twice!r} twice, also under Hugging Face's name: give it once.")
    return {**own, **made}


def as_array(name: str, value: Any) -> Any:
    """Return an array of another library as JAX's or numpy's, if possible without a copy; anything else as it is.

    Raises:
        ValueError: it cannot be handed over.
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic | QuantizedArray):
        return value
    try:
        for step in ("detach", "contiguous"):  # of torch: what has gradients or strides cannot be handed over
            value = getattr(value, step, lambda value=value: value)()
        if hasattr(value, "__dlpack__"):
            return jax.dlpack.from_dlpack(value)
        return np.asarray(value) if hasattr(value, "__array__") else value
    except Exception as error:  # whatever that library raises
        raise ValueError(
            f"params[{name!r}] of type {type(value).__name__} cannot be handed over ({error}): give a numpy array."
        ) from error
