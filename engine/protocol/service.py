"""How a request is to be served: its class and priority, until when, for which conversation, how quickly."""

import sys

from .message import Message


class SLO(Message, frozen=True, kw_only=True):
    """What an answer is to keep to, in milliseconds: a service level objective.

    Raises:
        ValueError: a time that is not a number above 0, or no time at all.
    """

    ttft_ms: float | None = None  # from arrival to the first token; None: any time will do
    tpot_ms: float | None = None  # for each token after the first; None: likewise
    # Of all requests that are to keep to it, in percent. With one a pool plans its roles itself; None: nobody plans.
    percentile: float | None = None

    def __post_init__(self) -> None:
        """Check the times and the percentile."""
        if self.ttft_ms is None and self.tpot_ms is None:
            raise ValueError("an SLO needs ttft_ms, tpot_ms or both: give one, or no SLO.")
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not is_positive(value):
                raise ValueError(f"{name}={value!r} is not usable: it must be a number of milliseconds above 0.")
        if self.percentile is not None and not (is_positive(self.percentile) and self.percentile < 100):
            raise ValueError(
                f"percentile={self.percentile!r} is not usable: it must be a number above 0 and below 100, such as 99."
            )


class Service(Message, frozen=True, kw_only=True):
    """How one request is to be served. Times are in seconds from its arrival, but for `due`."""

    priority: int = 0  # the lower the sooner, as in vLLM
    deadline: float | None = None  # for its last token; None: none
    first_token_deadline: float | None = None  # for its first token; None: none
    is_batch: bool = False  # it uses what interactive requests leave
    # Of a batch request, the instant on the engine's clock by which its job is wanted, the earliest first; None: after
    # those that have one. Unlike a deadline it ends nothing: what is late goes on.
    due: float | None = None
    session: str | None = None  # the conversation that it goes on with
    slo: SLO | None = None  # None: the engine's, if that has one


DEFAULT = Service()


def is_positive(value: object) -> bool:
    """Return whether this is a finite number above 0."""
    # An int may be too large for a float, and compares with one all the same.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
