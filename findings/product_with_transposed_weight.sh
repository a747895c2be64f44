#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: with one float32 row, `x @ w.T` and `einsum("bd,fd->bf", x, w)` name the same product, and the
# first takes about ten times as long or more.
#
# Seen on 2026-11-29 (w float32 [2048, 2048]):
#   as found: one row: x @ w.T takes at least 5 times as long as the einsum: 11 times
#   as found: the two agree to float32 rounding
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect, seconds

w = jax.random.normal(jax.random.key(0), (2048, 2048))
x = jax.random.normal(jax.random.key(1), (1, 2048))
transposed = jax.jit(lambda x, w: x @ w.T)
einsum = jax.jit(lambda x, w: jnp.einsum("bd,fd->bf", x, w))
slow, fast = (seconds(lambda: f(x, w).block_until_ready(), 20) for f in (transposed, einsum))
expect(slow > 5 * fast, f"one row: x @ w.T takes at least 5 times as long as the einsum: {slow / fast:.0f} times")
expect(bool(jnp.allclose(transposed(x, w), einsum(x, w), atol=1e-3)), "the two agree to float32 rounding")
PY
