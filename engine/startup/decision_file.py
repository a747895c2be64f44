"""The decision log's file at start-up: tried early, opened last.

A path that cannot be written shows before minutes of loading; what an earlier run wrote is overwritten only once the
engine is about to run. What is in a log is `decision_log.py`'s business.
"""

import os
from pathlib import Path

from ..scheduler.decision_log import DecisionLog, RunFacts


def check_log(path: str | Path | None) -> None:
    """Refuse a path that cannot be written, and leave what is there as it is. None: no log is wanted.

    Raises:
        ValueError: the file cannot be made or written.
    """
    if path is None:
        return
    try:
        place = _place(path)
        if not place.exists():
            place.open("xb").close()
            place.unlink()
        elif place.is_file() or place.is_dir():  # a pipe is opened once: its reader would take this for the end
            place.open("ab").close()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _refusal(path, error) from None


def open_log(path: str | Path, run: RunFacts) -> DecisionLog:
    """Open the log of this run, overwriting what is there; raises as `check_log` does."""
    try:
        return DecisionLog(_place(path), run)
    except OSError as error:
        raise _refusal(path, error) from None


def name_of(model: str | Path) -> str:
    """Return a model's name for the log: of a path its last part, since the rest is the user's own business."""
    return Path(model).name if isinstance(model, Path) or os.path.exists(os.path.expanduser(model)) else model


def _place(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))


def _refusal(path: str | Path, error: OSError | ValueError) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ValueError(f"decision_log={str(path)!r} cannot be written: {reason}.")
