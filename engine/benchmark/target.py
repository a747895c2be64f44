"""What a load runs on, in one interface: a real engine (`engine_target.py`) or a simulated one (`simulated_target.py`).

Both take the same `Load`, with the same arrivals, and give the same `Measured`: presets and reports do not know which
it was, but for `Run.source`. What issues requests by its own clock, as LoadGen and GuideLLM do, is no target's load:
its arrivals and lengths are recorded, and the simulator replays them (`simulation/loads/recorded.py`).
"""

from dataclasses import dataclass
from typing import Protocol

from ..metrics.report_file import Measured
from ..simulation.workload import Workload


@dataclass(frozen=True)
class Load:
    """Requests, open or closed loop, and how they are run. Every answer has exactly the length that is asked for."""

    workload: Workload
    # Requests that are run to their end before, and count nowhere. Simulated engines need none: their costs are warm.
    warmup: Workload | None = None
    # Seconds from the start of the load: whoever would come later does not come, nor do those that wait for him. What
    # has come is answered and counts.
    stop_after: float | None = None


class Target(Protocol):
    """An engine that loads run on, one after the other, each from an empty queue."""

    @property
    def longest(self) -> int:
        """Return the most tokens that prompt and answer may have together."""
        ...

    def run(self, load: Load) -> Measured:
        """Run a load to its end; requests that fail, are refused or expire are among the records.

        Raises:
            ValueError: a request of it can never be served.
            EngineError: the engine has ended.
        """
        ...
