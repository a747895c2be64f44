"""Which degrees of tensor parallelism a model allows, and how many key/value heads it then has on a mesh.

Each of a mesh's tp devices computes num_heads / tp query heads with the key/value heads that they read, and
intermediate_size / tp columns of the MLP (Shoeybi et al. 2019, Megatron-LM); with expert parallelism count / ep experts
instead, and intermediate_size / (tp / ep) columns of each. With fewer key/value heads than devices
each head is held by tp / num_kv_heads neighbours: weights and KV pool then count tp heads.
"""

from dataclasses import replace

from ...models.config import ModelConfig
from ..topology import MeshSpec, TopologyError


def check_tp(model: ModelConfig, spec: MeshSpec) -> None:
    """Refuse degrees of tensor and expert parallelism that the model's heads, columns or experts do not divide by.

    Raises:
        TopologyError: names the number that does not divide and the degrees that fit the model.
    """
    tp = spec.tp
    _check_ep(model, spec)
    if model.num_heads % tp:
        problem = f"the model's {model.num_heads} query heads do not divide by {tp}"
    elif model.num_kv_heads % tp and tp % model.num_kv_heads:
        problem = f"the model's {model.num_kv_heads} key/value heads neither divide by {tp} nor {tp} by them"
    elif model.intermediate_size % (tp // spec.ep):
        problem = f"the model's {model.intermediate_size} MLP columns do not divide by {tp // spec.ep}"
    else:
        return
    degrees = range(1, model.num_heads + 1)
    fitting = [n for n in degrees if _fits(model, n, spec.ep)]
    smaller_ep = "" if fitting else ", and an ep that divides it"
    shown = ", ".join(map(str, fitting or [n for n in degrees if _fits(model, n, 1)]))
    raise TopologyError(f"the {spec.role} mesh has tp {tp} and {problem}: use one of tp {shown}{smaller_ep}.")


def _check_ep(model: ModelConfig, spec: MeshSpec) -> None:
    if spec.ep == 1:
        return
    if model.experts is None:
        raise TopologyError(f"the {spec.role} mesh has ep {spec.ep} and the model has no experts: leave ep out.")
    count = model.experts.count
    if count % spec.ep:
        fitting = ", ".join(str(n) for n in range(1, min(count, spec.tp) + 1) if count % n == 0 and spec.tp % n == 0)
        raise TopologyError(
            f"the {spec.role} mesh has ep {spec.ep} and the model's {count} experts do not divide by {spec.ep}: use "
            f"one of ep {fitting}."
        )


def _fits(model: ModelConfig, tp: int, ep: int) -> bool:
    shares_heads = model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0
    divides = tp % ep == 0 and model.intermediate_size % (tp // ep) == 0
    return shares_heads and model.num_heads % tp == 0 and divides


def model_on(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the model as a mesh of `tp` devices runs it, with at least one key/value head on each device.

    Expects that `check_tp` has passed.
    """
    return replace(model, num_kv_heads=max(model.num_kv_heads, tp))
