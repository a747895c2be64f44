"""How callers say how requests are to be served: keyword arguments of every method that starts some. No JAX here."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ..config import check_slo
from ..protocol.service import SLO, Service, is_positive

_MOST = 2**31 - 1  # priorities are ints of 32 bits


class ServiceOptions(TypedDict, total=False):
    """How one request is to be served; all may be left out.

    Attributes:
        priority: the lower the sooner, as in vLLM; 0 by default.
        deadline: seconds from arrival to the last token; a request that has not ended by then ends with the tokens it
            has and finish_reason "deadline".
        first_token_deadline: likewise seconds from arrival to the first token.
        session: a name for the conversation that the request goes on with: it is kept where its KV is.
        slo: the times that its answer is to keep to, if not the engine's.
    """

    priority: int
    deadline: float | None
    first_token_deadline: float | None
    session: str | None
    slo: SLO | None


class ServicesOptions(TypedDict, total=False):
    """How several requests are to be served: `ServiceOptions`, each one value for all or a list with one for each."""

    priority: int | Sequence[int]
    deadline: float | Sequence[float | None] | None
    first_token_deadline: float | Sequence[float | None] | None
    session: str | Sequence[str | None] | None
    slo: SLO | Sequence[SLO | None] | None


def service_of(options: ServiceOptions | Mapping[str, Any]) -> Service:
    """Check how a request is to be served.

    Raises:
        ValueError: a value out of range or of the wrong type; the message names it.
    """
    priority = options.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool) or not -_MOST - 1 <= priority <= _MOST:
        raise ValueError(f"priority={priority!r} is not usable: it must be a whole number from -2**31 to 2**31 - 1.")
    for name in ("deadline", "first_token_deadline"):
        seconds = options.get(name)
        if seconds is not None:
            check_deadline(seconds, name, "arrival")
    session = options.get("session")
    if session is not None and (not isinstance(session, str) or not session):
        raise ValueError(f"session={session!r} is not usable: it must be a text that is not empty.")
    if session is not None and not _is_unicode(session):
        raise ValueError(f"session={session!r} is not usable: half a surrogate pair is no text.")
    check_slo(options.get("slo"))
    return Service(**options)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_deadline(seconds: object, name: str = "deadline", start: str = "now") -> None:
    """Raise ValueError, naming the option, unless this is a finite number of seconds above 0."""
    if not is_positive(seconds):
        raise ValueError(f"{name}={seconds!r} is not usable: it must be a number of seconds from {start} on, above 0.")


def services_of(options: ServicesOptions, count: int) -> list[Service]:
    """Check how so many requests are to be served.

    Raises:
        ValueError: as `service_of`, or a list of another length.
    """
    if not any(_is_list(value) for value in options.values()):
        return [service_of(options)] * count
    columns = {name: _column(name, value, count) for name, value in options.items()}
    return [service_of({name: column[i] for name, column in columns.items()}) for i in range(count)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _column(name: str, value: Any, count: int) -> Sequence[Any]:
    if not _is_list(value):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"There are {count} prompts and {len(value)} values of {name}: give one, or one for each.")
    column: Sequence[Any] = value
    return column
