#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.5.5: numpy adds bfloat16 up in bfloat16, one by one, without the pairwise tree that it uses for its
# own floats. 4,096 ones come to 256, where 257 no longer fits, and their mean is 0.0625. jnp.sum of the same is 4096.
#
# Seen on 2026-11-29:
#   as found: sum and mean of 4,096 ones in bfloat16: 256.0, 0.0625
#   as found: in float16: 4096.0
#   as found: with dtype=np.float32: 4096.0
#   as found: jnp.sum of the bfloat16: 4096.0
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.6.0 -- "$@"
run_python <<'PY'
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from finding import expect

ones = np.ones(4096, ml_dtypes.bfloat16)
total, mean, half = float(ones.sum()), float(ones.mean()), float(np.ones(4096, np.float16).sum())
expect((total, mean) == (256, 0.0625), f"sum and mean of 4,096 ones in bfloat16: {total}, {mean}")
expect(half == 4096, f"in float16: {half}")
expect(float(ones.sum(dtype=np.float32)) == 4096, "with dtype=np.float32: 4096.0")
expect(float(jnp.asarray(ones).sum()) == 4096, "jnp.sum of the bfloat16: 4096.0")
PY
