#!/usr/bin/env bash
# jax 0.12.0.1, CPU: the persistent compilation cache finds a program only in processes that have as many CPU devices as the
# one that stored it, although the program runs on one device and the key's inputs are the same otherwise.
#
# Seen on 2026-11-29 (one program for one device; each line a process of its own, all with the same cache folder):
#   as found: 1 device(s): compiled anew
#   as found: 1 device(s): found
#   as found: 2 device(s): compiled anew
#   as found: 2 device(s): found
#   as found: 1 device(s): found
#   as found: 4 device(s): compiled anew
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
export JAX_COMPILATION_CACHE_DIR="$folder/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
cat >"$folder/run.py" <<'PY'
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from finding import expect

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
device = jax.devices()[0]
x = jax.device_put(jnp.ones((8, 8)), device)
seen = Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rsplit("/", 1)[-1]]))
jax.jit(lambda x: jnp.tanh(x @ x))(x).block_until_ready()
found = seen["cache_hits"] == 1
expect(found == (sys.argv[2] == "hit"), f"{sys.argv[1]} device(s): {'found' if found else 'compiled anew'}")
PY
run_python <<'PY'
import subprocess
import sys

for arguments in (("1", "miss"), ("1", "hit"), ("2", "miss"), ("2", "hit"), ("1", "hit"), ("4", "miss")):
    sys.stdout.flush()
    if subprocess.run([sys.executable, "run.py", *arguments]).returncode:
        sys.exit(1)
PY
