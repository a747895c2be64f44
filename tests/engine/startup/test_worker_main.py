"""What a worker process answers while it does nothing else yet."""

import re
import subprocess
import sys
from queue import SimpleQueue

from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.worker import UNTOLD, Alive, Beat, NewParams
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.remote.processes import WorkerProcesses

LONG = 60.0


def test_a_worker_says_that_it_is_alive_between_parameters_that_keep_beats_waiting():
    backend, heard = WorkerProcesses(Topology.parse("both=1")), SimpleQueue()
    handle = backend.start(0, 1, heard.put, lambda why: None)
    try:
        handle.send(wire.encode(Beat(1, 7)))
        handle.send(wire.encode(NewParams(1, {})))
        assert [wire.decode_from_worker(heard.get(timeout=LONG)) for _ in range(2)] == [Alive(1, 7), Alive(1, 0)]
    finally:
        backend.close()


def test_a_worker_that_cannot_read_what_it_is_to_check_says_so():
    backend, heard = WorkerProcesses(Topology.parse("both=1")), SimpleQueue()
    handle = backend.start(0, 1, heard.put, lambda why: None)
    try:
        handle.send(b"\x09of another version")
        refused = wire.decode_from_worker(heard.get(timeout=LONG))
        assert refused.epoch == UNTOLD
        assert re.match(r"it could not read what it was sent: .* version 9, .*: run the same Twinmesh", refused.why)
    finally:
        backend.close()


def test_beats_are_answered_before_jax_is_imported():
    modules = "twinmesh.engine.startup.worker_main", "twinmesh.engine.worker.remote.processes"
    code = f"import sys; sys.path[:] = {sys.path!r}; import {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
