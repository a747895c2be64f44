"""Loads as they are written on a command line."""

from .traces import read_trace
from .workload import Workload


def read_workload(text: str) -> Workload:
    """Return the workload that a text stands for: the path of a trace.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text means nothing, or the file is no trace; iterating may raise one as well.
    """
    return read_trace(text)
