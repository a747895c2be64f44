#!/usr/bin/env bash
# jax 0.12.0.1: `jax.device_put` of a numpy array onto a mesh that spans processes sends the whole array between them, to see
# that all were given the same, though each process needs its own shard alone and has it already. Weights of 100 GB on two
# hosts are 100 GB over the network before the first step. `jax.make_array_from_callback` with the same sharding sends nothing.
# Counted in bytes that the loopback interface received (/proc/net/dev, so on Linux); two processes, gloo, one device each.
#
# Seen on 2026-11-30:
#   as found: device_put of 64 MB sends the array, each process to the other: 134 MB
#   as found: make_array_from_callback of the same sends next to nothing: 0 MB
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 -- "$@"
cat >"$folder/member.py" <<'PY'
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

port, number = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)


def received():
    with open("/proc/net/dev") as file:
        return next(int(line.split(":")[1].split()[0]) for line in file if line.strip().startswith("lo:"))


def sent_by(place):
    multihost_utils.sync_global_devices("before")
    start = received()
    array = jax.block_until_ready(place())
    multihost_utils.sync_global_devices("after")
    assert array.addressable_shards[0].data.shape == (4096, 2048)
    return received() - start


host = np.ones((8192, 2048), np.float32)  # 64 MiB
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
callback = sent_by(lambda: jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]))
put = sent_by(lambda: jax.device_put(host, sharding))
print(f"sent {put} {callback}")
PY
run_python <<'PY'
import socket
import subprocess
import sys

from finding import expect

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
members = [
    subprocess.Popen([sys.executable, "member.py", str(port), str(n)], stdout=subprocess.PIPE, text=True)
    for n in range(2)
]
(put, callback), _ = (tuple(map(int, member.communicate(timeout=120)[0].rsplit("sent ", 1)[1].split())) for member in members)
expect(put > 50e6, f"device_put of 64 MB sends the array, each process to the other: {put / 1e6:.0f} MB")
expect(callback < 1e6, f"make_array_from_callback of the same sends next to nothing: {callback / 1e6:.0f} MB")
PY
