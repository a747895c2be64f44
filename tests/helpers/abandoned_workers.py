"""A driver that has workers and waits to be killed, run by a test: `python abandoned_workers.py [MODEL]`.

It prints the processes of its workers: of an engine over the model, or of workers that have only been started.
"""

import sys
import threading

from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.worker import Beat
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.remote.processes import WorkerProcesses


def start_workers():
    backend, answers = WorkerProcesses(Topology.parse("prefill=1,decode=1")), threading.Semaphore(0)
    for worker in range(2):
        handle = backend.start(worker, 1, lambda data: answers.release(), lambda why: None)
        handle.send(wire.encode(Beat(1, 1)))
    for _ in range(2):
        answers.acquire()
    return backend


def start_engine(model):
    from helpers.core_engine import executor_of, greedy
    from helpers.workers import start

    llm = start(model)
    llm.add_request("endless", [5, 6, 7], greedy(100))
    return llm, executor_of(llm).crew.backend


def main():
    kept = start_engine(sys.argv[1]) if sys.argv[1:] else (None, start_workers())
    print(*(kept[1].pid(worker) for worker in range(2)), flush=True)
    sys.stdin.read()  # for ever


if __name__ == "__main__":
    main()
