"""Where the command `twinmesh` begins: Ctrl-C is one line from the first module on that is imported.

Imports take a third of a second, in which Python itself would answer Ctrl-C with a traceback, or drop it where it comes
inside of a callback. So the signal ends the process at once until `cli.py`, which ends a command in order, is there:
nothing is open before. Imports nothing beside the standard library and `cli.py`, and is no place for anything else.
"""

import os
import signal
import sys
from types import FrameType

_STOPPED = "twinmesh: Stopped.\n"


def main() -> int:
    """Run the command with the process's arguments and return the exit code, 130 after Ctrl-C."""
    try:
        # Ignored, as under nohup, it stays ignored; a handler of somebody who calls this from Python stays theirs.
        is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_ours:
            signal.signal(signal.SIGINT, _stop)
        from .cli import main as run

        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:
        sys.stderr.write(_STOPPED)
        return 130


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, _STOPPED.encode())
    os._exit(130)
