"""What happens to queries and keys between their projection and attention: a norm over head_dim, if any, and rotation.

In plain JAX, for every device; `prepare.py` does the same in a kernel for Hopper, together with the append. Computed in
float32; the norm's result is rounded to the inputs' dtype before it is rotated, as the models' own code does.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cos", "sin", "q_norm", "k_norm"], meta_fields=["eps"]
)  # fmt: skip
@dataclass(frozen=True)
class Rotation:
    """The norms and angles of T packed tokens."""

    cos: Array  # [T, D / 2] float32
    sin: Array  # [T, D / 2] float32
    q_norm: Array | None = None  # [D] float32, weight of the norm of every query head; None: no norm
    k_norm: Array | None = None  # [D] float32, of every key head; None exactly where q_norm is
    eps: float = 0.0  # added to the mean square

    def apply(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Norm and rotate q [T, Hq, D] and k [T, Hk, D]."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        return rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Apply the rotary embedding to x [T, H, D]: dimension i pairs with i + D / 2 (GPT-NeoX, Hugging Face)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [T, H, D / 2] each
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Compute x / rms(x) * weight over the last axis in float32 (Zhang and Sennrich 2019); shape and dtype stay."""
    full = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + eps)
    return (full * scale * weight).astype(x.dtype)
