#!/usr/bin/env bash
# jax 0.12.0.1: `jax.device_put` to the device where an array already is gives another Array over the same memory. Donating that
# "copy" deletes the original as well. `jnp.copy` copies, and so does a jitted identity, which one might take for an alias.
#
# Seen on 2026-11-29:
#   as found: device_put: another object, the same memory, and the original goes with it
#   as found: jnp.copy: memory of its own, the original survives
#   as found: a jitted identity: the same as jnp.copy
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect

step = jax.jit(lambda x: x + 1, donate_argnums=0)


def outcome(copy):
    """Is it another object, is the memory the same, and does the original survive the donation of what `copy` made?"""
    original = jnp.zeros(1 << 16)
    made = copy(original)
    facts = made is not original, made.unsafe_buffer_pointer() == original.unsafe_buffer_pointer()
    step(made)
    return *facts, not original.is_deleted()


put = outcome(lambda x: jax.device_put(x, jax.devices()[0]))
expect(put == (True, True, False), "device_put: another object, the same memory, and the original goes with it")
expect(outcome(jnp.copy) == (True, False, True), "jnp.copy: memory of its own, the original survives")
expect(outcome(jax.jit(lambda x: x)) == (True, False, True), "a jitted identity: the same as jnp.copy")
PY
