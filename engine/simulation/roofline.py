"""Costs that nobody has measured: from a model's sizes and the published peaks of a device.

Of each program (Williams 2009): a step takes as long as the slower of its arithmetic and of the reading of all weights,
plus its kernels' launches, plus the all-reduces of tensor parallelism; attention comes on top, as it depends on what is
in the step. The peaks are reached in part only; the parts are below, each with its reason. A cost model from here is
right in its proportions, and as for its size no better than these parts: it is marked "roofline" wherever it goes.
"""

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from .devices import DevicePeaks
from .profile import degrees

# Parts of the peaks that are reached, as published measurements have it (docs/performance.md compares).
_OF_FLOPS = 0.6  # large products of one step
_OF_BANDWIDTH = 0.8  # reading weights and KV
_OF_LINK = 0.8
# Kernels of a layer (norms, projections, rotary, append, attention, products) and around the layers.
_LAUNCHES, _LAUNCHES_OF_STEP = 8, 20
_HOST = HostCost(arrival=200e-6, token=0.5e-6, step=150e-6, row=2e-6, read=100e-6)


def roofline(model: ModelConfig, config: EngineConfig, device: DevicePeaks) -> CostModel:
    """Compute costs of an engine's programs on meshes of such devices."""
    prefill_tp, decode_tp = degrees(config.topology)
    prefill = {
        bucket: _program(model, config, device, prefill_tp, bucket, config.prefill_rows)
        for bucket in config.prefill_buckets
    }
    decode = {bucket: _program(model, config, device, decode_tp, bucket, bucket) for bucket in config.decode_buckets}
    fused: dict[int, ProgramCost] = {}
    if any(spec.fused for spec in config.topology.meshes):
        rows = config.decode_buckets[-1]
        fused = {
            bucket: _program(model, config, device, prefill_tp, bucket + rows, config.prefill_rows + rows)
            for bucket in config.prefill_buckets
        }
    link = LinkCost(fixed=50e-6, byte=1 / (_OF_LINK * device.link * min(prefill_tp, decode_tp)))
    return CostModel(prefill, decode, fused, link, _HOST)


def layer_parameters(model: ModelConfig) -> int:
    """Count the weights of the matrices of all layers."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


def head_parameters(model: ModelConfig) -> int:
    """Count the weights of the head, which a step reads for whatever it samples."""
    return model.vocab_size * model.hidden_size


def kv_bytes(model: ModelConfig, itemsize: int) -> int:
    """Return bytes of KV of one token, all layers together."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize


def _program(
    model: ModelConfig, config: EngineConfig, device: DevicePeaks, tp: int, tokens: int, sampled: int
) -> ProgramCost:
    itemsize = 4 if config.dtype == "float32" else 2
    weights = (layer_parameters(model) + head_parameters(model)) * itemsize / tp
    products = 2 * (layer_parameters(model) * tokens + head_parameters(model) * sampled) / tp
    flops, bandwidth = _OF_FLOPS * device.flops[config.dtype], _OF_BANDWIDTH * device.bandwidth
    step = (
        max(products / flops, weights / bandwidth)
        + _launches(model, device)
        + _all_reduces(model, device, tp, tokens, itemsize)
    )
    pair = 4 * model.num_layers * model.num_heads * model.head_dim / tp / flops  # q . k, and weights x v
    return ProgramCost(fixed=step, pair=pair, context=kv_bytes(model, itemsize) / tp / bandwidth)


def _launches(model: ModelConfig, device: DevicePeaks) -> float:
    return device.launch * (_LAUNCHES * model.num_layers + _LAUNCHES_OF_STEP)


def _all_reduces(model: ModelConfig, device: DevicePeaks, tp: int, tokens: int, itemsize: int) -> float:
    """Return the seconds of two all-reduces a layer: each device sends 2 (tp - 1) / tp of the activations (a ring)."""
    if tp == 1:
        return 0.0
    size = tokens * model.hidden_size * itemsize
    each = 2 * (tp - 1) / tp * size / (_OF_LINK * device.link) + 2 * device.launch * tp
    return 2 * model.num_layers * each
