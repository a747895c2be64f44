"""The collector of cycles while a simulation runs.

A simulation makes and drops objects all the time and leaves hardly any cycle behind: to look for cycles after every few
hundred of them finds nothing, and takes some percent of the run.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW = 50_000  # objects, besides those that were dropped, after which it looks


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Have the collector look seldom until the end of the block; as often as before from then on."""
    before = gc.get_threshold()
    gc.set_threshold(_NEW, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
