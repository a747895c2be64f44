#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: what is restored has the dtype that was asked for, whatever lies on disk: float32 weights restored as
# int8 are cut to whole numbers without a word. A shape that differs is refused.
#
# Seen on 2026-11-29:
#   as found: 0.25, 1.75, -2.5, 100.9 restored as int8: [0, 1, -2, 100]
#   as found: restored with another shape: refused
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare orbax-checkpoint==0.12.8 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint
from finding import expect

path = tempfile.mkdtemp() + "/checkpoint"
checkpointer = orbax.checkpoint.StandardCheckpointer()
checkpointer.save(path, {"w": jnp.array([0.25, 1.75, -2.5, 100.9])})
checkpointer.wait_until_finished()
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def restored(shape, dtype):
    return checkpointer.restore(path, {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=here)})["w"].tolist()


cut = restored((4,), jnp.int8)
expect(cut == [0, 1, -2, 100], f"0.25, 1.75, -2.5, 100.9 restored as int8: {cut}")
try:
    refused = not restored((2,), jnp.float32)
except ValueError:
    refused = True
expect(refused, "restored with another shape: refused")
PY
