"""What the core asks of an executor: that of this process, one behind a wire, or a simulator's."""

from collections.abc import Mapping
from typing import Protocol

from .actions import Command
from .results import Traffic


class Executor(Protocol):
    """What performs commands on its meshes, and posts a `Completion` for each step and transfer from any thread.

    One thread calls `perform`, and each mesh performs its commands in that order. A message that cannot be read, on
    either side, is posted as a `MeshLost` (`wire.py`).
    """

    @property
    def traffic(self) -> Traffic:
        """Return what hand-offs have moved so far."""
        ...

    def perform(self, command: Command) -> None:
        """Start one command, without waiting for a device.

        An error that a step, copy or scatter raises costs its mesh, and one that a transfer raises costs the transfer;
        an error of any other command stops the engine, and so does an `EngineError` of any command.
        """
        ...

    def flush(self) -> None:
        """Let what was performed go out: a turn of the loop is over. Where nothing is kept back it does nothing."""
        ...

    def check_params(self, new: Mapping[str, object]) -> None:
        """Raise ValueError for parameters, by name, that cannot stand in for the present ones.

        Raises EngineError where the engine can no longer tell what those that stay are.
        """
        ...

    def replace_params(self, new: Mapping[str, object]) -> None:
        """Use these parameters, by name, from here on. They are handles: arrays of the caller's, never messages."""
        ...

    def close(self) -> None:
        """Wait for what is in flight, join the threads and let go of every array."""
        ...
