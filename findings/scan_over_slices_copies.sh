#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: a `lax.scan` over layers that takes each layer's slice of a donated cache (xs) and gives it back (ys)
# holds a second cache, although input and output are aliased. With the whole cache as the carry, written by layer, it does not.
#
# Seen on 2026-11-29:
#   as found: layers as slices: 18886904 bytes of temporaries for a cache of 16777216
#   as found: the cache as carry: 12600
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect

LAYERS = 8


def sliced(pool, ids, new):
    def layer(x, pages):
        pages = pages.at[ids].set(new + x, mode="drop")
        return pages[ids].sum(0), pages

    return jax.lax.scan(layer, jnp.zeros(new.shape[1:]), pool)[::-1]


def carried(pool, ids, new):
    def layer(state, number):
        pool, x = state
        pool = pool.at[number, ids].set(new + x, mode="drop")
        return (pool, pool[number, ids].sum(0)), None

    return jax.lax.scan(layer, (pool, jnp.zeros(new.shape[1:])), jnp.arange(LAYERS))[0]


def temporaries(step):
    shapes = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
        ((LAYERS, 512, 16, 64), jnp.float32), ((3,), jnp.int32), ((3, 16, 64), jnp.float32))]  # fmt: skip
    memory = jax.jit(step, donate_argnums=0).lower(*shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= HELD
    return memory.temp_size_in_bytes


HELD = LAYERS * 512 * 16 * 64 * 4
slices, carry = temporaries(sliced), temporaries(carried)
expect(slices >= HELD, f"layers as slices: {slices} bytes of temporaries for a cache of {HELD}")
expect(carry < HELD / 100, f"the cache as carry: {carry}")
PY
