#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: a scatter of ONE row into a donated array, read and written again by the next layer, copies the
# whole array; of two rows it copies nothing. A scatter of a single index is rewritten to a select and a
# dynamic-update-slice, and the fusion around them does not work in place. The array is aliased in both cases: donation works.
#
# Seen on 2026-11-29 (array of 33,554,432 bytes, four layers):
#   as found: temporaries with one row hold the array: 33571009 bytes
#   as found: with two rows they hold less than a hundredth of it: 32912 bytes
#   as found: no scatter is left with one row, one is with two
#   as found: one row takes at least 5 times as long as two: 141 times
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect, seconds

LAYERS, PAGES, SIZE, HEADS, DIM = 4, 512, 16, 4, 64


def layers(pool, page, offset, new):
    out = new
    for layer in range(LAYERS):
        pool = pool.at[page + layer * PAGES, offset].set(new + out, mode="drop")
        out = pool[page + layer * PAGES].sum(1)
    return pool, out


def measure(rows):
    pool, ids, new = jnp.zeros((LAYERS * PAGES, SIZE, HEADS, DIM)), jnp.arange(rows), jnp.ones((rows, HEADS, DIM))
    program = jax.jit(layers, donate_argnums=0).lower(pool, ids, ids, new).compile()

    def step():
        nonlocal pool
        pool, _ = program(pool, ids, ids, new)
        pool.block_until_ready()

    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= pool.nbytes
    return memory.temp_size_in_bytes, " scatter(" in program.as_text(), seconds(step, 10), pool.nbytes


(one, one_scatters, slow, size), (two, two_scatters, fast, _) = measure(1), measure(2)
expect(one >= size, f"temporaries with one row hold the array: {one} bytes")
expect(two < size / 100, f"with two rows they hold less than a hundredth of it: {two} bytes")
expect(two_scatters and not one_scatters, "no scatter is left with one row, one is with two")
expect(slow > 5 * fast, f"one row takes at least 5 times as long as two: {slow / fast:.0f} times")
PY
