"""What a decoder-only model is, as one frozen value for every family.

A family file turns a checkpoint's own configuration into a `ModelConfig`; the decoder, the KV cache and the
hand-off read nothing else. Control-plane module: no JAX here.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle[t, i] = t * theta ** (-2 i / head_dim) / factors[i].

    `factors` has head_dim / 2 entries (None: all 1); every static kind of rope scaling comes down to them, see
    `families/rope.py`.
    """

    theta: float
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends.

    `window` counts the tokens a query sees, itself included (None: all). `softcap` is the tanh cap on the scaled
    scores (None: none).
    """

    rope: Rope
    window: int | None = None
    softcap: float | None = None


type Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    `layers` holds one `AttentionSpec` per layer, first to last. `activation` is the MLP gate's. `qkv_bias`: the query,
    key and value projections add a bias. `qk_norm`: queries and keys pass an RMS norm over head_dim before they are
    rotated. `sandwich_norms`: the outputs of attention and MLP pass a norm of their own before they are added.
    `embedding_scale` multiplies the embeddings. `query_scale` is the factor on q . k (None: head_dim ** -0.5).
    `fits_float16`: activations stay within float16's range.

    Raises:
        ValueError: query heads that are no multiple of the key/value heads, or an odd head size.
    """

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
    activation: Activation = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    fits_float16: bool = True

    def __post_init__(self) -> None:
        """Refuse heads that cannot be shared out or rotated.

        Raises:
            ValueError: with the numbers that do not fit.
        """
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_heads} query heads over {self.num_kv_heads} KV heads of size {self.head_dim} are not "
                "implemented."
            )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def attention_scale(self) -> float:
        """Factor on q . k before the softmax: by default head_dim ** -0.5 (Vaswani et al. 2017, section 3.2.1)."""
        return 1.0 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale
