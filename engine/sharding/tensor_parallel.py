"""Checks which degrees of tensor parallelism a model allows, and repeats key/value heads where there are too few.

Each of a mesh's tp devices computes num_heads / tp query heads with the key/value heads that they read, and
intermediate_size / tp columns of the MLP (Shoeybi et al. 2019, Megatron-LM). With fewer key/value heads than devices
each head is held by tp / num_kv_heads neighbours: weights and KV pool then count tp heads.

Numbers and host arrays only; `mesh.py` places arrays on devices.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...models.config import ModelConfig
from ..topology import MeshSpec, TopologyError


def check_tp(model: ModelConfig, spec: MeshSpec) -> None:
    """Refuse a degree of tensor parallelism that the model's heads or MLP columns cannot be divided by.

    Raises:
        TopologyError: names the number that does not divide and the degrees that fit the model.
    """
    tp = spec.tp
    if model.num_heads % tp:
        problem = f"the model's {model.num_heads} query heads do not divide by {tp}"
    elif model.num_kv_heads % tp and tp % model.num_kv_heads:
        problem = f"the model's {model.num_kv_heads} key/value heads neither divide by {tp} nor {tp} by them"
    elif model.intermediate_size % tp:
        problem = f"the model's {model.intermediate_size} MLP columns do not divide by {tp}"
    else:
        return
    fitting = ", ".join(str(n) for n in range(1, model.num_heads + 1) if _fits(model, n))
    raise TopologyError(f"the {spec.role} mesh has tp {tp} and {problem}: use one of tp {fitting}.")


def _fits(model: ModelConfig, tp: int) -> bool:
    shares_heads = model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0
    return shares_heads and model.num_heads % tp == 0 and model.intermediate_size % tp == 0


def model_on(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the model as a mesh of `tp` devices runs it, with at least one key/value head on each device.

    Expects that `check_tp` has passed.
    """
    return replace(model, num_kv_heads=max(model.num_kv_heads, tp))


def expand(
    array: np.ndarray, axes: Sequence[str], model: ModelConfig, tp: int, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """Convert a parameter of `model` to the shape it has in `model_on(model, tp)` by repeating its key/value heads.

    Query head h of the model reads head h // (num_heads / num_kv_heads), so repeating each head next to itself keeps
    every query head with the head that it reads.

    Args:
        array: the parameter in the checkpoint's shape.
        axes: its logical axes, one name per dimension.
        model: the checkpoint's model.
        tp: devices of the mesh.
        index: a slice per dimension of the result, to return that part only; None: all.
    """
    if tp <= model.num_kv_heads or "kv_heads" not in axes:
        return array if index is None else array[index]
    index = index or (slice(None),) * array.ndim
    axis = axes.index("kv_heads")
    heads = np.arange(tp)[index[axis]] // (tp // model.num_kv_heads)
    rest = tuple(slice(None) if dimension == axis else part for dimension, part in enumerate(index))
    return array[rest].take(heads, axis)
