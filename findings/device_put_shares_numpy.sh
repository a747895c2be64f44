#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `jax.device_put` of a numpy array that begins at a multiple of 64 bytes takes its memory over, on every
# device of the process at once; four bytes further on it copies. What is written into the numpy array later is then seen.
# `jnp.asarray` copies both.
#
# Seen on 2026-11-29:
#   as found: at a multiple of 64 bytes all devices share numpy's memory: [True, True, True, True]
#   as found: what numpy writes afterwards is in all of them
#   as found: four bytes further on it is a copy
#   as found: jnp.asarray copies
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax

jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from finding import expect


def array_at(offset, count=1 << 16):
    raw = np.zeros(count * 4 + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + count * 4].view(np.float32)


def shares(host, arrays):
    return [array.unsafe_buffer_pointer() == host.ctypes.data for array in arrays]


aligned, odd = array_at(0), array_at(4)
on_all = [jax.device_put(aligned, device) for device in jax.devices()]
expect(all(shares(aligned, on_all)), f"at a multiple of 64 bytes all devices share numpy's memory: {shares(aligned, on_all)}")
jax.block_until_ready(on_all)
aligned[0] = 7
expect(all(float(array[0]) == 7 for array in on_all), "what numpy writes afterwards is in all of them")
expect(not any(shares(odd, [jax.device_put(odd)])), "four bytes further on it is a copy")
expect(not any(shares(aligned, [jnp.asarray(aligned)])), "jnp.asarray copies")
PY
