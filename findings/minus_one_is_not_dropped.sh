#!/usr/bin/env bash
# jax 0.12.0.1: `x.at[ids].set(..., mode="drop")` drops ids past the end, not -1: that is the last row, as in numpy. A page table
# padded with -1 writes into the last page. `wrap_negative_indices=False` drops it.
#
# Seen on 2026-11-29:
#   as found: ids -1 and 4 of 4 rows: [0.0, 0.0, 0.0, 1.0]
#   as found: without wrapping: [0.0, 0.0, 0.0, 0.0]
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax.numpy as jnp
from finding import expect

pages, ids = jnp.zeros(4), jnp.array([-1, 4])
wrapped = pages.at[ids].set(1, mode="drop").tolist()
dropped = pages.at[ids].set(1, mode="drop", wrap_negative_indices=False).tolist()
expect(wrapped == [0, 0, 0, 1], f"ids -1 and 4 of 4 rows: {wrapped}")
expect(dropped == [0, 0, 0, 0], f"without wrapping: {dropped}")
PY
