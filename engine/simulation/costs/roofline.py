"""Costs that nobody has measured: from a model's sizes and the published peaks of a device.

Of each program (Williams 2009): a step takes as long as the slower of its products and of the reading of all weights,
plus the starts of its kernels, plus the all-reduces of tensor parallelism; attention comes on top, as it depends on
what is in the step. Peaks are reached in part only: `Efficiency` says how far, and why. A cost model from here is right
in its proportions, and in its size as far as those parts are; it is marked "roofline" wherever it goes.

Layers with an attention window count as though it were always full: for sequences shorter than the window that is too
much. Products are as fast as the engine's dtype, whatever the weights are kept in.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ....models.config import ModelConfig
from ...config import EngineConfig
from ...scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from ...sizing.weight_sizes import weight_parts
from .devices import DevicePeaks
from .profile import degrees


class Efficiency(NamedTuple):
    """Which parts of a device's peaks an engine reaches, and what it does besides.

    The defaults: products of a prefill step reach 0.6 of the peak, as published figures of prefill do; weights and KV
    are read at 0.8 of it, about what a copy reaches. Of a Qwen3-8B decode step XLA makes 747 operations, 20.8 a layer,
    each a kernel. Together they give 7.2 ms a token on an H100, where 7.22 was published of vLLM (docs/performance.md
    has the table).
    """

    flops: float = 0.6
    bandwidth: float = 0.8
    link: float = 0.8
    kernels_of_layer: float = 20.8
    transfer: float = 50e-6  # seconds of a hand-off before its first byte moves
    host: HostCost = HostCost(arrival=200e-6, token=0.5e-6, step=150e-6, row=2e-6, read=100e-6)


USUAL = Efficiency()


def roofline(
    model: ModelConfig,
    config: EngineConfig,
    device: DevicePeaks,
    efficiency: Efficiency = USUAL,
    formats: Mapping[str, str] | None = None,
) -> CostModel:
    """Compute the costs of an engine's programs on meshes of such devices, with the tp that its topology says.

    `formats`: path -> format, of the weights that stay quantised; None: there are none.
    """
    prefill_tp, decode_tp = degrees(config.topology)
    weights = _Weights.of(model, config.dtype, formats or {})
    prefill, decode = (_Mesh(model, config, device, tp, efficiency, weights) for tp in (prefill_tp, decode_tp))
    fused: dict[int, ProgramCost] = {}
    if any(spec.fused for spec in config.topology.meshes):
        rows = config.decode_buckets[-1]
        fused = {size: prefill.program(size + rows, config.prefill_rows + rows) for size in config.prefill_buckets}
    return CostModel(
        prefill={size: prefill.program(size, config.prefill_rows) for size in config.prefill_buckets},
        decode={size: decode.program(size, size) for size in config.decode_buckets},
        fused=fused,
        # Each device sends its own heads.
        link=LinkCost(efficiency.transfer, 1 / (efficiency.link * device.link * min(prefill_tp, decode_tp))),
        host=efficiency.host,
    )


class _Weights(NamedTuple):
    """Bytes of a model's weights, on all devices of a mesh together."""

    always: int  # of attention, norms and router, or of all layers where there are no experts
    experts: int  # all of them
    head: int

    @classmethod
    def of(cls, model: ModelConfig, dtype: str, formats: Mapping[str, str]) -> "_Weights":
        """Count them; the embedding serves as the head where the two are one."""
        parts = weight_parts(model, dtype, 1, formats)
        head = "embedding" if model.tie_embeddings else "head"
        tables = {kind: sum(part.bytes for part in parts if part.kind == kind) for kind in ("experts", head)}
        layers = sum(part.bytes for part in parts if part.kind not in ("embedding", "head", "experts"))
        return cls(layers, tables["experts"], tables[head])

    def read(self, model: ModelConfig, tokens: int) -> float:
        """Return the bytes that a step of so many tokens reads; of the embedding it reads a few rows."""
        return self.always + share_read(model, tokens) * self.experts + self.head


class _Mesh:
    """A model on devices that share its heads and columns."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        device: DevicePeaks,
        tp: int,
        efficiency: Efficiency,
        weights: _Weights,
    ) -> None:
        self._model, self._device, self._tp, self._efficiency = model, device, tp, efficiency
        self._weights = weights
        self._itemsize = 4 if config.dtype == "float32" else 2
        self._flops = efficiency.flops * device.flops[config.dtype] * tp
        self._bandwidth = efficiency.bandwidth * device.bandwidth * tp

    def program(self, tokens: int, sampled: int) -> ProgramCost:
        """Return the costs of a step that is padded to so many tokens, of which so many rows pass the head."""
        model = self._model
        products = 2 * (layer_weights(model) * tokens + head_weights(model) * sampled) / self._flops
        reading = self._weights.read(model, tokens) / self._bandwidth
        full = sum(layer.window is None for layer in model.layers)
        window = sum(layer.window for layer in model.layers if layer.window is not None)  # of all layers that have one
        pair = 4 * model.num_heads * model.head_dim / self._flops  # q . k, and weights x v, in one layer
        read = 2 * model.num_kv_heads * model.head_dim * self._itemsize / self._bandwidth  # of a token, in one layer
        is_prompt = tokens > sampled
        return ProgramCost(
            fixed=max(products, reading)
            + self._device.launch * self._efficiency.kernels_of_layer * model.num_layers
            + self._all_reduces(tokens)
            + (pair * window * tokens if is_prompt else 0.0),
            pair=pair * full,
            row=read * window,
            context=read * full,
        )

    def _all_reduces(self, tokens: int) -> float:
        """Return the seconds of two all-reduces a layer: in a ring each device sends 2 (tp - 1) / tp of the
        activations, in 2 (tp - 1) turns."""
        if self._tp == 1:
            return 0.0
        turns, device = 2 * (self._tp - 1), self._device
        sent = turns / self._tp * tokens * self._model.hidden_size * self._itemsize
        return 2 * self._model.num_layers * (sent / (self._efficiency.link * device.link) + turns * device.launch)


def layer_weights(model: ModelConfig) -> int:
    """Count the weights that a token is multiplied by in all layers: of experts, those that it passes."""
    passed = 1 if model.experts is None else model.experts.per_token
    return model.num_layers * (_other_weights(model) + passed * _mlp_weights(model))


def share_read(model: ModelConfig, tokens: int) -> float:
    """Return the share of its experts that a step of so many tokens reads: of X those that some token passes.

    It is 1 - (1 - K / X) ** tokens, if each token takes K of them at random; 1 where there are none.
    """
    if model.experts is None:
        return 1.0
    return 1 - (1 - model.experts.per_token / model.experts.count) ** tokens


def _mlp_weights(model: ModelConfig) -> int:
    """Count the weights of a layer's MLP, or of one expert."""
    return 3 * model.hidden_size * model.intermediate_size


def _other_weights(model: ModelConfig) -> int:
    """Count the weights of a layer's attention, and of its router."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    return attention + (0 if model.experts is None else model.experts.count * model.hidden_size)


def head_weights(model: ModelConfig) -> int:
    """Count the weights of the head, all of which a step reads."""
    return model.vocab_size * model.hidden_size
