#!/usr/bin/env bash
# jax 0.12.0.1: `jax.lax.top_k` puts 0.0 above -0.0, which `argmax`, `max`, `==` and a stable descending `jnp.sort` take for
# equal. So `top_k(x, 1)` and `argmax(x)` name different tokens, and "all that is at least the k-th value" keeps more than k.
#
# Seen on 2026-11-29:
#   as found: top_k(1) gives index 3, argmax index 1
#   as found: 2 elements are at least as large as the one that top_k(1) gives
#   as found: a stable descending argsort takes the first of the two zeros first: [1, 3, 0, 2]
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect

x = jnp.array([-1.0, -0.0, -3.0, 0.0], jnp.float32)
value, index = jax.jit(lambda x: jax.lax.top_k(x, 1))(x)
most = int(jax.jit(jnp.argmax)(x))
expect(int(index[0]) == 3 and most == 1, f"top_k(1) gives index {int(index[0])}, argmax index {most}")
kept = int(jax.jit(lambda x: (x >= jax.lax.top_k(x, 1)[0]).sum())(x))
expect(kept == 2, f"{kept} elements are at least as large as the one that top_k(1) gives")
order = jax.jit(lambda x: jnp.argsort(x, stable=True, descending=True))(x)
expect(order.tolist() == [1, 3, 0, 2], f"a stable descending argsort takes the first of the two zeros first: {order.tolist()}")
PY
