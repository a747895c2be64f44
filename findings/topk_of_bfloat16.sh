#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `jax.lax.top_k` of bfloat16 takes many times as long as of the same values in float32, although
# there are half as many bytes. Casting first changes no result: bfloat16 fits float32 exactly.
#
# Seen on 2026-11-29 (one row of 150,000, k = 64):
#   as found: bfloat16 takes at least 5 times as long as float32: 93 times
#   as found: cast to float32 first, it is the same answer in less than a fifth of the time
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect, seconds

wide = jax.random.normal(jax.random.key(0), (1, 150_000))
narrow = wide.astype(jnp.bfloat16)
top = jax.jit(lambda x: jax.lax.top_k(x, 64))
cast = jax.jit(lambda x: jax.lax.top_k(x.astype(jnp.float32), 64))
of_wide, of_narrow, of_cast = (
    seconds(lambda: jax.block_until_ready(f(x))) for f, x in ((top, wide), (top, narrow), (cast, narrow))
)
expect(of_narrow > 5 * of_wide, f"bfloat16 takes at least 5 times as long as float32: {of_narrow / of_wide:.0f} times")
same = bool((top(narrow)[1] == cast(narrow)[1]).all())
expect(
    same and of_narrow > 5 * of_cast,
    "cast to float32 first, it is the same answer in less than a fifth of the time",
)
PY
