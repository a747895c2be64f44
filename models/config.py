"""What a decoder-only model is, as one frozen value for every family.

A family file turns a checkpoint's own configuration into a `ModelConfig`; the decoder, the KV cache and the
hand-off read nothing else. Control-plane module: no JAX here.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends.

    `window` counts the tokens a query sees, itself included (None: all). `softcap` is the tanh cap on the scaled
    scores (None: none). `rope_theta` is the base of the rotary frequencies.
    """

    rope_theta: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder. `layers` holds one `AttentionSpec` per layer, first to last."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_embeddings: bool
    max_position: int
    layers: tuple[AttentionSpec, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def attention_scale(self) -> float:
        """Factor on q . k before the softmax: head_dim ** -0.5 (Vaswani et al. 2017, section 3.2.1)."""
        return 1.0 / math.sqrt(self.head_dim)
