#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: a program that reads some rows of a donated array and then writes some copies all of it, where the
# write does not depend on what was read: nothing orders the two, so both may not have the same memory. A write of values
# that come from the read works in place, and so does one behind an `optimization_barrier`, with no other cost in memory.
#
# Seen on 2026-11-29:
#   as found: a write apart from the read before it: 16789516 bytes of temporaries for an array of 16777216
#   as found: a write of values that come from the read: 12360
#   as found: a write behind an optimization_barrier: 12360
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect


def apart(pool, ids, new):
    total = pool[ids].sum()
    return pool.at[ids].set(new, mode="drop"), total


def depending(pool, ids, new):
    total = pool[ids].sum()
    return pool.at[ids].set(new + total, mode="drop"), total


def ordered(pool, ids, new):
    pool, total = jax.lax.optimization_barrier((pool, pool[ids].sum()))
    return pool.at[ids].set(new, mode="drop"), total


HELD = 4096 * 16 * 64 * 4


def temporaries(step):
    shapes = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
        ((4096, 16, 64), jnp.float32), ((3,), jnp.int32), ((3, 16, 64), jnp.float32))]  # fmt: skip
    memory = jax.jit(step, donate_argnums=0).lower(*shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= HELD
    return memory.temp_size_in_bytes


alone, tied, barred = temporaries(apart), temporaries(depending), temporaries(ordered)
expect(alone >= HELD, f"a write apart from the read before it: {alone} bytes of temporaries for an array of {HELD}")
expect(tied < HELD / 100, f"a write of values that come from the read: {tied}")
expect(barred < HELD / 100, f"a write behind an optimization_barrier: {barred}")
PY
