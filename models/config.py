"""The configuration of a decoder-only model: one frozen value, the same for every family.

A family file turns a checkpoint's own configuration into a `ModelConfig`; the decoder, the KV cache and the hand-off
read nothing else. The control plane imports this module: no JAX here.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle[t, i] = t * theta ** (-2 i / head_dim) / factors[i].

    Every static kind of rope scaling can be expressed by the factors and the magnitude, see `families/rope.py`.
    """

    theta: float  # the base
    factors: tuple[float, ...] | None = None  # head_dim / 2 entries; None: all 1
    magnitude: float = 1.0  # multiplies rotated queries and keys, so its square multiplies the scores (YaRN)


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends."""

    rope: Rope
    window: int | None = None  # how many tokens a query attends to, itself included; None: all before it
    softcap: float | None = None  # tanh cap on the scaled scores (Gemma 2); None: no cap


type Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class ClampedGate:
    """The gated unit of GPT-OSS: g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit), u = clip(up, +-limit)."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of every layer's MLP (Shazeer et al. 2017).

    A router scores the experts for each token; the `per_token` best each transform it as an MLP does, of
    `ModelConfig.intermediate_size` columns, and their outputs are added up by weight.

    Raises:
        ValueError: fewer experts than a token is to pass.
    """

    count: int  # X
    per_token: int  # K, how many of them a token passes
    # Whether weights are the softmax over the chosen experts' scores (which is that over all experts, scaled to a sum
    # of 1); False: those parts of the softmax over all experts as they are.
    is_normalised: bool = True
    has_bias: bool = False  # whether the router and the experts' projections add biases
    clamped: ClampedGate | None = None  # takes the place of the gated unit with `ModelConfig.activation`

    def __post_init__(self) -> None:
        """Refuse a choice of more experts than there are.

        Raises:
            ValueError: names both numbers.
        """
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"{self.per_token} experts per token of {self.count} are not possible.")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    Raises:
        ValueError: query heads that are no multiple of the key/value heads, or an odd head size.
    """

    family: str  # name for messages and metrics
    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # E
    intermediate_size: int  # F, columns of the MLP, or of each expert
    num_heads: int  # Hq, query heads
    num_kv_heads: int  # Hk, key/value heads; divides num_heads
    head_dim: int  # D, even
    rms_norm_eps: float  # added to the mean square in every norm
    tie_embeddings: bool  # whether the head is the embedding
    max_position: int  # the longest sequence, in tokens
    layers: tuple[AttentionSpec, ...]  # one per layer, first to last
    activation: Activation = "silu"  # of the MLP's gate
    qkv_bias: bool = False  # whether the query, key and value projections add a bias
    output_bias: bool = False  # whether attention's output projection adds a bias
    has_sinks: bool = False  # whether each query head has a logit that joins the softmax without a value (GPT-OSS)
    qk_norm: bool = False  # whether queries and keys pass an RMS norm over head_dim before they are rotated
    sandwich_norms: bool = False  # whether the outputs of attention and MLP pass a norm before they are added
    embedding_scale: float = 1.0  # factor on the embeddings
    query_scale: float | None = None  # factor on q . k; None: head_dim ** -0.5
    fits_float16: bool = True  # whether activations stay within float16's range
    experts: Experts | None = None  # None: every layer has an MLP

    def __post_init__(self) -> None:
        """Refuse heads that cannot be grouped or rotated.

        Raises:
            ValueError: names the numbers that do not fit.
        """
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_heads} query heads over {self.num_kv_heads} KV heads of size {self.head_dim} are not "
                "implemented."
            )

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return len(self.layers)

    @property
    def attention_scale(self) -> float:
        """Return the factor on q . k before the softmax: by default head_dim ** -0.5 (Vaswani 2017, section 3.2.1)."""
        return 1.0 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale
