"""Worker processes end when their driver does, for whatever reason, also in the middle of their start."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import abandoned_workers

LONG = 60_000  # milliseconds


def wait_for_end(pid):
    """Wait until a process that is no child of this one has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(LONG), f"process {pid} outlives its driver"
    os.close(descriptor)


def kill_a_driver(*arguments):
    """Start a driver, kill it once it has workers, and wait for their end."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    driver = subprocess.Popen(
        [sys.executable, Path(abandoned_workers.__file__), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    workers = list(map(int, driver.stdout.readline().split()))
    assert len(workers) == 2
    driver.kill()
    driver.wait()
    for pid in workers:
        wait_for_end(pid)
    driver.stdin.close()
    driver.stdout.close()


def test_no_worker_outlives_a_driver_that_is_killed():
    kill_a_driver()


@pytest.mark.long
def test_no_worker_outlives_an_engine_that_is_killed(tiny_path):
    kill_a_driver(tiny_path)
