"""When a request arrived, ran and ended."""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import msgspec

from .list_view import ListView


class Timeline(msgspec.Struct):
    """Stamps in seconds on the engine's clock; None until it happens. TTFT counts from arrival, queueing included.

    After a preemption or a lost mesh the stamps of the first run stay; `tokens` are stamped when they are read.
    """

    arrival: float
    prefill_start: float | None = None  # the first chunk was dispatched
    prefill_end: float | None = None  # the first token was read
    kv_ready: float | None = None  # the KV was in place on the decode mesh; never set where nothing moved
    finish: float | None = None
    tokens: Sequence[float] = msgspec.field(default_factory=lambda: array("d"))  # a stamp a token, as it was read

    def stamp_token(self, now: float) -> None:
        """Stamp the next token."""
        self.tokens.append(now)  # type: ignore[attr-defined]  # an array, as of every request that goes on

    def stamp_tokens(self, stamps: "array[float]") -> None:
        """Stamp the next tokens."""
        self.tokens.extend(stamps)  # type: ignore[attr-defined]

    def so_far(self, tokens: int) -> "Timeline":
        """Return the stamps of a request that goes on, up to this many tokens: the same, whenever it is asked."""
        stamps = cast("array[float]", self.tokens)
        count = min(tokens, len(stamps))
        last = stamps[count - 1] if count else self.arrival
        kv_ready = self.kv_ready if self.kv_ready is not None and self.kv_ready <= last else None
        start, end = (self.prefill_start, self.prefill_end) if count else (None, None)
        return Timeline(self.arrival, start, end, kv_ready, None, ListView(stamps, count))

    def whole(self) -> "Timeline":
        """Return the stamps of a request that has ended, a copy."""
        return Timeline(
            self.arrival, self.prefill_start, self.prefill_end, self.kv_ready, self.finish, list(self.tokens)
        )

    @property
    def first_token(self) -> float | None:
        """Return when the first token was read."""
        return self.tokens[0] if self.tokens else None

    @property
    def ttft(self) -> float | None:
        """Return the time to first token: from arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def e2e(self) -> float | None:
        """Return the end-to-end time: from arrival to finish."""
        return None if self.finish is None else self.finish - self.arrival

    @property
    def tpot(self) -> float | None:
        """Return the time per output token after the first: (last - first) / (n - 1), for n >= 2 tokens."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Return the inter-token latencies: the raw gaps between tokens."""
        return [b - a for a, b in pairwise(self.tokens)]

    @property
    def handoff(self) -> float | None:
        """Return the time from first token to KV ready on the decode mesh; 0 where the KV was stamped before it."""
        if self.kv_ready is None or self.first_token is None:
            return None
        return max(0.0, self.kv_ready - self.first_token)
