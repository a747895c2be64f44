"""A driver that starts workers and waits to be killed: `python abandoned_workers.py`, run by a test."""

import sys
import threading

from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.worker import Beat
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.remote.processes import WorkerProcesses


def main():
    backend, answers = WorkerProcesses(Topology.parse("prefill=1,decode=1")), threading.Semaphore(0)
    for worker in range(2):
        handle = backend.start(worker, 1, lambda data: answers.release(), lambda why: None)
        handle.send(wire.encode(Beat(1, 1)))
    for _ in range(2):
        answers.acquire()
    print(*(backend.pid(worker) for worker in range(2)), flush=True)
    sys.stdin.read()  # for ever


if __name__ == "__main__":
    main()
