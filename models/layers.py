"""The building blocks of the decoder as flax.nnx modules: norm, rotary and token embedding, attention, MLP.

Every parameter is an `nnx.Param` whose metadata entry `axes` names one logical axis per dimension ("vocab", "embed",
"q_heads", "kv_heads", "head_dim", "mlp"); a mesh maps those names to its own axes. Nothing here knows about pages,
meshes, batching or checkpoints. T is the number of packed tokens. `moe.py` has what may take the MLP's place.

Weights are stored [in, out]; q, k, v and gate, up are separate arrays. Measured on 2 Zen 4 cores in float32 over
SmolLM2's 30 layers (ms at 1 / 8 / 64 / 512 rows, best of two runs):

    [in, out] separate  12.0 / 16.2 / 51 / 284        [in, out] fused  13.6 / 17.6 / 59 / 319
    [out, in] separate  14.1 / 27.4 / 56 / 297        [out, in] fused  11.8 / 23.3 / 51 / 298

The embedding is [vocab, embed] for the lookup; this does not slow the head (2.1 ms for one row in either order).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ..kernels_pallas.matmul import PLAIN, Products, matmul, score
from ..kernels_pallas.quantized import QuantizedArray, take_rows
from ..kernels_pallas.rotary import Rotation, rms_norm
from .config import Activation, ModelConfig, Rope
from .quantized import Weight


def param(
    shape: tuple[int, ...], axes: tuple[str, ...], dtype: DTypeLike, inputs: int | None = None, stacked: int = 0
) -> nnx.Param[Weight]:
    """Make a zero parameter of `shape` with one logical axis name per dimension. Values come from a checkpoint.

    `inputs` says that it may be quantised, and with `stacked` how its matrices lie: as in `QuantizedArray`.
    """
    if len(shape) != len(axes):
        raise ValueError(f"A parameter of shape {shape} needs {len(shape)} axis names, not {axes}.")
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes, inputs=inputs, stacked=stacked)


def value(parameter: nnx.Param[Weight]) -> jax.Array:
    """Return the array inside a parameter that is never quantised."""
    array = parameter.get_value()
    assert not isinstance(array, QuantizedArray)
    return array


def multiply(x: jax.Array, weight: nnx.Param[Weight], products: Products) -> jax.Array:
    """Multiply x [T, *inputs] by a weight [*inputs, *outputs] -> [T, *outputs]; or score it by a table, in float32.

    This is one matrix product over reshaped operands: in an einsum over heads and head_dim XLA CPU transposes the
    weights on every call (SmolLM2, 30 layers, one row: 21 ms instead of 12).
    """
    w, inputs, rows = weight.get_value(), weight.get_metadata("inputs"), x.reshape(x.shape[0], -1)
    product = matmul if inputs else score
    if isinstance(w, QuantizedArray):
        split = products.split(weight.get_metadata("axes"), w)
        out = product(rows, w, split=split, products=products)
    else:
        out = product(rows, w.reshape(rows.shape[1], -1) if inputs else w)
    return out.reshape(x.shape[0], *(w.shape[inputs:] if inputs else w.shape[:1]))


def rotary_tables(positions: jax.Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Compute cosine and sine of the rotary angles, each [T, head_dim / 2] float32.

    angle[t, i] = positions[t] * theta ** (-2 i / head_dim) / factors[i] (Su et al. 2021, RoFormer, section 3.2.2);
    both are multiplied by the magnitude.
    """
    # On the host in float64: a power on the device may err by more than the last bit, and the position multiplies that.
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.factors is not None:
        frequencies = frequencies / np.array(rope.factors)
    angles = positions.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)  # [T, D / 2]
    if rope.magnitude == 1:
        return jnp.cos(angles), jnp.sin(angles)
    magnitude = np.float32(rope.magnitude)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis: `kernels_pallas.rotary.rms_norm`.

    The weight is float32 whatever the model's dtype: it is small, and where a family adds 1 to it when it is loaded
    (Gemma), 16 bits would lose what the checkpoint holds.

    Args:
        size: length of the last axis.
        eps: added to the mean square.
        axis: logical name of the last axis.
    """

    def __init__(self, size: int, eps: float, *, axis: str = "embed") -> None:
        self.eps = eps
        self.weight = param((size,), (axis,), jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., size]; shape and dtype stay."""
        return rms_norm(x, value(self.weight), self.eps)


class Attention(nnx.Module):
    """The four projections of (grouped-query) attention. The caller supplies attention itself: see `decoder.Attend`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        hidden, dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.products = products
        queries, keys = (config.num_heads, dim), (config.num_kv_heads, dim)
        of_queries, of_keys = ("q_heads", "head_dim"), ("kv_heads", "head_dim")
        self.q_proj = param((hidden, *queries), ("embed", *of_queries), dtype, inputs=1)
        self.k_proj = param((hidden, *keys), ("embed", *of_keys), dtype, inputs=1)
        self.v_proj = param((hidden, *keys), ("embed", *of_keys), dtype, inputs=1)
        self.o_proj = param((*queries, hidden), (*of_queries, "embed"), dtype, inputs=2)
        self.has_bias, self.has_norms = config.qkv_bias, config.qk_norm
        if config.qkv_bias:
            self.q_bias = param(queries, of_queries, dtype)
            self.k_bias, self.v_bias = param(keys, of_keys, dtype), param(keys, of_keys, dtype)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim, eps, axis="head_dim"), RMSNorm(dim, eps, axis="head_dim")
        self.has_output_bias, self.has_sinks = config.output_bias, config.has_sinks
        if config.output_bias:
            self.o_bias = param((hidden,), ("embed",), dtype)
        if config.has_sinks:
            self.sinks = param((config.num_heads,), ("q_heads",), jnp.float32)

    def qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project [T, E] to q [T, Hq, D] and k, v [T, Hk, D]; q and k are still to be normed and rotated."""
        q, k, v = (multiply(x, w, self.products) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_bias:
            q, k, v = q + value(self.q_bias), k + value(self.k_bias), v + value(self.v_bias)
        return q, k, v

    def rotation(self, cos: jax.Array, sin: jax.Array) -> Rotation:
        """Make what q and k are to pass before they attend: the norms, if the model has them, and the angles."""
        if not self.has_norms:
            return Rotation(cos, sin)
        return Rotation(cos, sin, value(self.q_norm.weight), value(self.k_norm.weight), self.q_norm.eps)

    @property
    def sink(self) -> jax.Array | None:
        """Return the sinks [Hq] float32; None: there are none."""
        return value(self.sinks) if self.has_sinks else None

    def output(self, attended: jax.Array) -> jax.Array:
        """Project the attended values [T, Hq, D] -> [T, E]."""
        out = multiply(attended, self.o_proj, self.products)
        return out + value(self.o_bias) if self.has_output_bias else out


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """Apply the MLP gate's activation elementwise."""
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """A gated unit: down(activation(gate(x)) * up(x)); SwiGLU with SiLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation, self.products = config.activation, products
        self.gate_proj = param((hidden, inner), ("embed", "mlp"), dtype, inputs=1)
        self.up_proj = param((hidden, inner), ("embed", "mlp"), dtype, inputs=1)
        self.down_proj = param((inner, hidden), ("mlp", "embed"), dtype, inputs=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform hidden states [T, E] -> [T, E]."""
        gate, up = (multiply(x, w, self.products) for w in (self.gate_proj, self.up_proj))
        return multiply(activate(gate, self.activation) * up, self.down_proj, self.products)


class Embedding(nnx.Module):
    """A [vocab, embed] table: token lookup, and the head that scores every token against a hidden state."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        self.scale, self.dtype, self.products = config.embedding_scale, jnp.dtype(dtype), products
        self.weight = param((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype, inputs=0)

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Look up token ids [T] -> [T, E], scaled by the model's factor.

        Ids past the table are clipped: JAX's default would fill their rows with NaN.
        """
        w = self.weight.get_value()
        if isinstance(w, QuantizedArray):
            rows = take_rows(w, tokens).astype(self.dtype)
        else:
            rows = w.at[tokens].get(mode="clip")
        # The factor is rounded to the weights' dtype, as in Gemma's own code.
        return rows if self.scale == 1 else rows * jnp.asarray(self.scale, rows.dtype)

    def score(self, hidden: jax.Array) -> jax.Array:
        """Score every token against hidden states [R, E] -> [R, V] float32 logits."""
        return multiply(hidden, self.weight, self.products)
