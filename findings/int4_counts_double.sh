#!/usr/bin/env bash
# jax 0.12.0.1: `nbytes` of an int4 or float4 array counts a byte for each element; on the device two of them share one, and a
# program counts them so. On the host they do take a byte each: numpy has no smaller element.
#
# Seen on 2026-11-29:
#   as found: 65536 of int4: nbytes, on the host, on the device: (65536, 65536, 32768)
#   as found: 65536 of float4_e2m1fn: nbytes, on the host, on the device: (65536, 65536, 32768)
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from finding import expect

COUNT = 1 << 16
for kind in (jnp.int4, jnp.float4_e2m1fn):
    array = jnp.zeros(COUNT, kind)
    program = jax.jit(lambda x: x.astype(jnp.float32)).lower(array).compile()
    device = program.memory_analysis().argument_size_in_bytes
    sizes = array.nbytes, np.asarray(array).nbytes, device
    expect(sizes == (COUNT, COUNT, COUNT // 2), f"{COUNT} of {array.dtype}: nbytes, on the host, on the device: {sizes}")
PY
