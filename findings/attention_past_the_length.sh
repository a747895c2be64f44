#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `jax.nn.dot_product_attention` masks scores past `key_value_seq_lengths`, not values. A NaN in an unused
# value slot makes the output NaN (0 times NaN); one in an unused key slot does not. A row of length 0 is the mean of all slots.
#
# Seen on 2026-11-29:
#   as found: NaN in keys past the length: no harm
#   as found: NaN in values past the length: the output is NaN
#   as found: length 0 over values 0 to 7: 3.5, the mean of slots that hold nothing
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect

LENGTH, SLOTS = 4, 8
query, ones = jnp.ones((1, 1, 1, 64)), jnp.ones((1, SLOTS, 1, 64))
dirty = ones.at[:, LENGTH:].set(jnp.nan)
rising = jnp.arange(float(SLOTS))[None, :, None, None] * ones


def attend(keys, values, length):
    out = jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=jnp.array([length]))
    return float(out[0, 0, 0, 0])


expect(attend(dirty, ones, LENGTH) == 1.0, "NaN in keys past the length: no harm")
expect(jnp.isnan(attend(ones, dirty, LENGTH)), "NaN in values past the length: the output is NaN")
expect(attend(ones, rising, 0) == 3.5, "length 0 over values 0 to 7: 3.5, the mean of slots that hold nothing")
PY
