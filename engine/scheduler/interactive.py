"""Whether interactive requests are about: some are in the engine, or were a minute ago. No clock: callers say when."""

from dataclasses import dataclass
from math import inf

# For so many seconds after the last has ended, the next is expected at any moment.
EXPECTED = 60.0


@dataclass
class Interactive:
    """The interactive requests of an engine, as a count."""

    count: int = 0  # that have entered and not ended
    last_end: float = -inf

    def enter(self) -> None:
        """Note that one has entered."""
        self.count += 1

    def end(self, now: float) -> None:
        """Note that one has ended."""
        self.count -= 1
        self.last_end = now

    def change(self, was_batch: bool, is_batch: bool, now: float) -> None:
        """Note that a request is served in another way from here on."""
        if was_batch and not is_batch:
            self.enter()
        elif is_batch and not was_batch:
            self.end(now)

    def is_about(self, now: float) -> bool:
        """Return whether batch work has to leave the way open."""
        return self.count > 0 or now < self.last_end + EXPECTED
