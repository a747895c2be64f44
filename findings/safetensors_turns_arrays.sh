#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy.save` writes the memory of a transposed array as it lies, under the transposed shape. Loaded
# again the numbers are in other places, and nothing is said. The flax functions of the same package are right for a jax.Array.
#
# Seen on 2026-11-29:
#   as found: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] comes back as [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   as found: after np.ascontiguousarray it comes back as it was
#   as found: and a transposed jax.Array by safetensors.flax
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare safetensors==0.8.0 numpy==2.5.5 jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 -- "$@"
run_python <<'PY'
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy
from finding import expect

turned = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
back = safetensors.numpy.load(safetensors.numpy.save({"x": turned}))["x"]
whole = safetensors.numpy.load(safetensors.numpy.save({"x": np.ascontiguousarray(turned)}))["x"]
flax = safetensors.flax.load(safetensors.flax.save({"x": jnp.arange(6.0).reshape(2, 3).T}))["x"]
expect(back.shape == turned.shape and not (back == turned).all(), f"{turned.tolist()} comes back as {back.tolist()}")
expect(bool((whole == turned).all()), "after np.ascontiguousarray it comes back as it was")
expect(bool((np.asarray(flax) == turned).all()), "and a transposed jax.Array by safetensors.flax")
PY
