#!/usr/bin/env bash
# jax 0.12.0.1: `jax.device_put` from a mesh of 2 devices to a mesh of 4 reads the whole array into host memory and uploads it
# from there, without a word. Between meshes of equal size, whose shards match one to one, it goes from device to device.
# Counted by watching ArrayImpl._value, the property through which the host reads an array; no public name tells.
#
# Seen on 2026-11-29:
#   as found: from 2 to 2 devices the host reads nothing: []
#   as found: from 2 to 4 devices the host reads the whole array: [(8, 1024)]
#   as found: from 2 devices to a copy on each of 2 others as well: [(8, 1024)]
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax

jax.config.update("jax_num_cpu_devices", 8)
import jax._src.array
import numpy as np
from finding import expect
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

read, value = [], jax._src.array.ArrayImpl._value
jax._src.array.ArrayImpl._value = property(lambda array: (read.append(array.shape), value.fget(array))[1])


def on(first, count, spec):
    return NamedSharding(Mesh(np.array(jax.devices()[first : first + count]), ("x",)), spec)


def host_reads(destination):
    array = jax.jit(lambda: jax.numpy.ones((8, 1024)), out_shardings=on(0, 2, P("x")))()
    read.clear()
    jax.block_until_ready(jax.device_put(array, destination))
    return list(read)


equal, unequal, copies = host_reads(on(4, 2, P("x"))), host_reads(on(4, 4, P("x"))), host_reads(on(4, 2, P()))
expect(equal == [], f"from 2 to 2 devices the host reads nothing: {equal}")
expect((8, 1024) in unequal, f"from 2 to 4 devices the host reads the whole array: {unequal}")
expect((8, 1024) in copies, f"from 2 devices to a copy on each of 2 others as well: {copies}")
PY
