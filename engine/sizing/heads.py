"""Which degrees of tensor parallelism a model allows, and how many key/value heads it then has on a mesh.

Each of a mesh's tp devices computes num_heads / tp query heads with the key/value heads that they read, and
intermediate_size / tp columns of the MLP (Shoeybi et al. 2019, Megatron-LM). With fewer key/value heads than devices
each head is held by tp / num_kv_heads neighbours: weights and KV pool then count tp heads.
"""

from dataclasses import replace

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
