"""How a request is to be served: its class and priority, until when, for which conversation, how quickly."""

import sys

from .message import Message


class SLO(Message, frozen=True, kw_only=True):
    """What an answer is to keep to, in milliseconds: a service level objective.

    Raises:
        ValueError: a time that is not a number above 0, or no time at all; a percentile that is not above 0 and below
            100.
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

    def with_percentile(self) -> "SLO":
        """Return it with a percentile, to plan by: its own, or 99."""
        percentile = _USUAL_PERCENTILE if self.percentile is None else self.percentile
        return SLO(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms, percentile=percentile)


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

_USUAL_PERCENTILE = 99.0  # of requests, where an SLO to plan by does not say
_MILLISECONDS = {"ms": 1.0, "s": 1000.0}


def read_slo(text: str) -> SLO:
    """Read an SLO as in "ttft=1000ms,tpot=50ms,percentile=99"; times need a unit, ms or s.

    Raises:
        ValueError: it cannot be read; says what can.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        key = f"{name}_ms" if name in ("ttft", "tpot") else name
        if not sign or key not in ("ttft_ms", "tpot_ms", "percentile") or key in values:
            what = "is there twice" if key in values else "is none of ttft, tpot and percentile"
            raise ValueError(f"slo {text!r}: {part.strip()!r} {what}: write as in ttft=1000ms,tpot=50ms,percentile=99.")
        values[key] = _number(text, name, value, is_time=key != "percentile")
    return SLO(**values)


def _number(text: str, name: str, value: str, *, is_time: bool) -> float:
    """Read one number of an SLO, a time in milliseconds."""
    number = value.rstrip("abcdefghijklmnopqrstuvwxyz%")
    unit = value[len(number) :]
    try:
        found = float(number)
    except ValueError:
        raise ValueError(f"slo {text!r}: {name}={value} is no number: write as in {name}=50{'ms' * is_time}.") from None
    if is_time and unit not in _MILLISECONDS:
        raise ValueError(f"slo {text!r}: {name}={value} has no unit, ms or s: write {name}={number.strip()}ms.")
    if not is_time and unit:
        raise ValueError(f"slo {text!r}: {name}={value} has a unit: write {name}={number.strip()}.")
    return found * _MILLISECONDS[unit] if is_time else found


def is_positive(value: object) -> bool:
    """Return whether this is a finite number above 0."""
    # An int may be too large for a float, and compares with one all the same.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
