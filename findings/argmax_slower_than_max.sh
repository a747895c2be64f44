#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `argmax` over a vocabulary takes many times as long as `max`, and even longer than a `top_k` with
# k = 1. A maximum followed by the least index that equals it is the same answer in a fraction of the time.
#
# Seen on 2026-11-29 (float32 [64, 49152]):
#   as found: argmax takes at least 5 times as long as max: 110 times
#   as found: top_k(1) lies between the two: 28 times max
#   as found: the maximum and then the least index that equals it are faster than argmax, with the same answer: 13 times max
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
from finding import expect, seconds


@jax.jit
def two_steps(x):
    ids = jnp.arange(x.shape[1])
    return jnp.where(x == x.max(1, keepdims=True), ids, x.shape[1]).min(1)


x = jax.random.normal(jax.random.key(0), (64, 49_152))
argmax = jax.jit(lambda x: x.argmax(1))
ways = {"max": jax.jit(lambda x: x.max(1)), "top": jax.jit(lambda x: jax.lax.top_k(x, 1)), "arg": argmax, "two": two_steps}
took = {name: seconds(lambda: jax.block_until_ready(way(x)), 10) for name, way in ways.items()}
times = {name: spent / took["max"] for name, spent in took.items()}
expect(times["arg"] > 5, f"argmax takes at least 5 times as long as max: {times['arg']:.0f} times")
expect(1 < times["top"] < times["arg"], f"top_k(1) lies between the two: {times['top']:.0f} times max")
expect(
    times["two"] < times["arg"] and bool((two_steps(x) == argmax(x)).all()),
    "the maximum and then the least index that equals it are faster than argmax, with the same answer: "
    f"{times['two']:.0f} times max",
)
PY
