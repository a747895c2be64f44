#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: donating an array that numpy also sees is taken without a warning, and copies it. `np.asarray(x)` is
# such a view while it lives (the array is not even deleted then), and so is an aligned numpy array that was put on the device.
#
# Seen on 2026-11-29:
#   as found: donated, nobody else sees it: written in place
#   as found: donated while a view of np.asarray lives: copied, and not deleted
#   as found: donated after device_put of an aligned numpy array: deleted, but copied
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from finding import expect

warnings.simplefilter("error")  # "Some donated buffers were not usable" would end the run
step = jax.jit(lambda x: x.at[0].set(1), donate_argnums=0)


def address(x):
    return x.unsafe_buffer_pointer()


def in_place(x):
    before = address(x)
    after = step(x)
    return address(after) == before, x.is_deleted()


alone = in_place(jnp.zeros(1 << 16))
viewed = jnp.zeros(1 << 16)
view = np.asarray(viewed)
seen = in_place(viewed)
raw = np.zeros((1 << 18) + 64, np.uint8)
start = -raw.ctypes.data % 64
aligned = raw[start : start + (1 << 18)].view(np.float32)
put = in_place(jax.device_put(aligned))
expect(alone == (True, True), "donated, nobody else sees it: written in place")
expect(seen == (False, False) and view[0] == 0, "donated while a view of np.asarray lives: copied, and not deleted")
expect(put == (False, True) and aligned[0] == 0, "donated after device_put of an aligned numpy array: deleted, but copied")
PY
