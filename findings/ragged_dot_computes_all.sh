#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `jax.lax.ragged_dot` computes every group for every row and copies all groups to do so: with 64 experts
# 64 times the arithmetic of the rows that count. It is right, and a reference only.
#
# Seen on 2026-11-29:
#   as found: 64.3 times the arithmetic that is needed, with 64 experts
#   as found: 67108884 bytes of temporaries for 33554432 of weights
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect

EXPERTS, ROWS, DEPTH, COLUMNS = 64, 512, 256, 512
x, weights = jnp.ones((ROWS, DEPTH)), jnp.ones((EXPERTS, DEPTH, COLUMNS))
program = jax.jit(jax.lax.ragged_dot).lower(x, weights, jnp.full(EXPERTS, ROWS // EXPERTS)).compile()
times = program.cost_analysis()["flops"] / (2 * ROWS * DEPTH * COLUMNS)
temporaries = program.memory_analysis().temp_size_in_bytes
expect(times > EXPERTS * 0.9, f"{times:.1f} times the arithmetic that is needed, with {EXPERTS} experts")
expect(temporaries >= weights.nbytes, f"{temporaries} bytes of temporaries for {weights.nbytes} of weights")
PY
