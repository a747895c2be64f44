#!/usr/bin/env bash
# jax 0.12.0.1, XLA on CPU: `jnp.cumsum` of probabilities is not monotone: over 150,000 of them, none negative, it steps down many
# times, because different prefixes are added up in different trees. numpy's adds in order and never does.
#
# Seen on 2026-11-29:
#   as found: jnp.cumsum steps down 56 times
#   as found: np.cumsum 0 times
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
run_python <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from finding import expect

mass = jnp.sort(jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (150_000,))))[::-1]
down = int((np.diff(np.asarray(jnp.cumsum(mass))) < 0).sum())
in_order = int((np.diff(np.cumsum(np.asarray(mass))) < 0).sum())
expect(bool((mass >= 0).all()) and down > 0, f"jnp.cumsum steps down {down} times")
expect(in_order == 0, f"np.cumsum {in_order} times")
PY
