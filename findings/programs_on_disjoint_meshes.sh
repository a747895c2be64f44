#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: programs over two devices run one after the other, though they share no device and hold no
# collective; programs over one device each run side by side. A short program on devices 2 and 3 is done only when the long one
# on devices 0 and 1 is. Dispatch does not wait, so nothing shows it but the order in which results come.
#
# Seen on 2026-11-29:
#   as found: one device each: the short program was done while the long one ran
#   as found: two devices each: the short program was done only after the long one
#   as found: the same where each has a psum
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax

jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from finding import expect
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P


def short_ended_first(devices, collective):
    """A long program on the first devices, then a short one on the others: was the long one still running at its end?"""

    def work(x, rounds):
        x = jax.lax.psum(x, "x") / 2 if collective else x
        return jax.lax.fori_loop(0, rounds[0], lambda _, x: jnp.sin(x) + jnp.cos(x), x)

    calls = []
    for first, rounds in ((0, 5000), (devices, 1)):
        mesh = Mesh(np.array(jax.devices()[first : first + devices]), ("x",))
        split = NamedSharding(mesh, P("x"))
        step = jax.shard_map(work, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
        # One device of the pair has little to do: it would be free.
        arrays = np.zeros((devices, 1 << 14), np.float32), np.array([1] * (devices - 1) + [rounds], np.int32)
        calls.append((jax.jit(step), [jax.device_put(array, split) for array in arrays]))
        jax.block_until_ready(calls[-1][0](*calls[-1][1]))
    long, short = (step(*arrays) for step, arrays in calls)
    short.block_until_ready()
    return not long.is_ready()


expect(short_ended_first(1, False), "one device each: the short program was done while the long one ran")
expect(not short_ended_first(2, False), "two devices each: the short program was done only after the long one")
expect(not short_ended_first(2, True), "the same where each has a psum")
PY
