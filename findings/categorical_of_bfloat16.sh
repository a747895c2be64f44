#!/usr/bin/env bash
# jax 0.12.0.1: `jax.random.categorical` of bfloat16 logits draws its noise in bfloat16 too. There are 128 different uniform
# numbers in that type, so the largest noise comes up several hundred times over a vocabulary and the least index of those wins:
# of 49,152 equally likely tokens only the first few hundred or so are ever drawn. Cast to float32 they are all drawn alike.
#
# Seen on 2026-11-29:
#   as found: uniform numbers in bfloat16 have 128 values
#   as found: 500 draws from bfloat16 logits, all equal: the largest id is 992
#   as found: from float32 logits it is 49149 of 49152
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from finding import expect

VOCABULARY = 49_152
key, logits = jax.random.key(0), jnp.zeros((500, VOCABULARY), jnp.bfloat16)
narrow = np.asarray(jax.random.categorical(key, logits))
wide = np.asarray(jax.random.categorical(key, logits.astype(jnp.float32)))
values = len(np.unique(np.asarray(jax.random.uniform(key, (100_000,), jnp.bfloat16)).astype(np.float32)))
expect(values == 128, f"uniform numbers in bfloat16 have {values} values")
expect(narrow.max() < VOCABULARY / 10, f"500 draws from bfloat16 logits, all equal: the largest id is {narrow.max()}")
expect(wide.max() > VOCABULARY * 0.9, f"from float32 logits it is {wide.max()} of {VOCABULARY}")
PY
