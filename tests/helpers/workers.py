"""Engines whose meshes live in worker processes, and what may happen to those.

A `worker_timeout` of a minute keeps a loaded machine from losing workers that only wait for their turn.
"""

import os
import signal
from contextlib import contextmanager

from helpers.core_engine import ask, executor_of, greedy, prompts_of
from twinmesh import LLM

OPTIONS = dict(
    max_model_len=128, page_size=16, max_num_seqs=4, prefill_buckets=(16,), decode_buckets=(4,), kv_cache_bytes=4 << 20,
    dtype="float32", deterministic=True,
)  # fmt: skip
LONG = 300.0  # seconds, after which a test has failed


def start(path, topology="prefill=1,decode=1", **changes):
    """Start an engine with a process for each mesh."""
    return LLM(path, topology=topology, workers="processes", **({"worker_timeout": 60.0} | OPTIONS | changes))


def pid_of(llm, worker):
    """The process of a worker."""
    return executor_of(llm).crew.backend.pid(worker)


def kill(llm, worker):
    """End a worker with SIGKILL; return its epoch."""
    crew = executor_of(llm).crew
    epoch = crew.epochs()[worker]
    os.kill(crew.backend.pid(worker), signal.SIGKILL)
    return epoch


def wait_until_back(llm, worker, epoch):
    """Wait until a worker serves in an epoch after this one, and the scheduler knows."""
    assert executor_of(llm).crew.wait_until_it_serves(worker, epoch, LONG)
    assert not ask(llm, lambda scheduler, executor: scheduler.meshes[worker].is_gone)


@contextmanager
def nothing_left(llm):
    """Check at the end that every page and slot is free, and nothing is kept of any request or transfer.

    Short requests go through first: transfers leave a mesh in order, so what was sent before has arrived.
    """
    yield
    llm.generate(prompts_of(3, 3, 3, 3, seed=99), greedy(3))
    ask(llm, _check_at_rest)


def _check_at_rest(scheduler, executor):
    scheduler.check_integrity()
    assert not scheduler.requests
    assert not executor.records
    assert not executor.num_staged
    for mesh in scheduler.meshes:
        assert all(pages.num_free == pages.num_pages for pages in mesh.pages.groups)
        assert mesh.pages.slots.num_free == scheduler.config.max_num_seqs
        assert not mesh.placed
