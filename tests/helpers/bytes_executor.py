"""An executor behind bytes: every command and completion passes, encoded, through a process without JAX (`relay.py`).

    monkeypatch.setattr(build, "LocalExecutor", bytes_executor(relay))

`damage(message, data)` may change the bytes of a message on its last leg, as a bad link would.
"""

import subprocess
import sys
import threading
from pathlib import Path

from helpers.relay import HEAD
from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.results import MeshLost
from twinmesh.engine.worker.local_executor import LocalExecutor


class Relay:
    """A relay process, and in `passed` the number of messages of each type that went through it."""

    def __init__(self):
        script = Path(__file__).with_name("relay.py")
        # A group of its own, so that a Ctrl-C which a test sends does not reach it.
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        self._lock, self.passed = threading.Lock(), {}

    def send(self, kind, message):
        """Send a message through the process; return its bytes as they come out."""
        data = wire.encode(message)
        with self._lock:
            self._process.stdin.write(HEAD.pack(kind, len(data)) + data)
            self._process.stdin.flush()
            back, size = HEAD.unpack(self._process.stdout.read(HEAD.size))
            assert back == kind
            name = type(message).__name__
            self.passed[name] = self.passed.get(name, 0) + 1
            return self._process.stdout.read(size)

    def close(self):
        """Wait for the end of the process, which must never have imported JAX."""
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


def bytes_executor(relay, damage=lambda message, data: data):
    """Make a class that stands in for `LocalExecutor`."""

    class BytesExecutor(LocalExecutor):
        def __init__(self, meshes, post, clock, maps=None):
            self._posted, self._now = post, clock
            super().__init__(meshes, self._send_back, clock, maps)

        def perform(self, command):
            data = damage(command, relay.send(b"c", command))
            received = wire.read_command(data, mesh_of(command), self._now())
            if isinstance(received, MeshLost):
                self._send_back(received)
            else:
                super().perform(received)

        def _send_back(self, completion):
            data = damage(completion, relay.send(b"r", completion))
            self._posted(wire.read_completion(data, mesh_of(completion), self._now()))

    return BytesExecutor


def mesh_of(message):
    """Return the mesh that a message is for or from; the first one, if the message names none."""
    for name in ("mesh", "source", "destination"):
        if hasattr(message, name):
            return getattr(message, name)
    return 0
