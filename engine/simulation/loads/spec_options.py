"""Options of a load as they are written on a command line: `key=value,key=value`; a sentence for each that is wrong.

Whoever takes an option says what it must be; what nobody has taken is refused at the end, so that no option is ignored.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf

from .lengths import Span

MOST_REQUESTS = 100_000_000


class Options:
    """The options of one load."""

    def __init__(self, load: str, text: str) -> None:
        """Read options; `load` is for messages.

        Raises:
            ValueError: a part is no `key=value`, or a key is there twice.
        """
        self._load, self._values = load, dict[str, str]()
        self._known: list[str] = []
        for part in text.split(",") if text.strip() else ():
            key, sign, value = (piece.strip() for piece in part.partition("="))
            if not sign or not key or not value:
                raise self._error(f"{part.strip()!r} is no key=value")
            if key in self._values:
                raise self._error(f"{key} is there twice")
            self._values[key] = value

    def has(self, key: str) -> bool:
        """Return whether an option is there."""
        self._known.append(key)
        return key in self._values

    def text(self, key: str) -> str:
        """Take an option as it is.

        Raises:
            ValueError: it is not there.
        """
        if not self.has(key):
            raise self._error(f"{key}= is missing")
        return self._values.pop(key)

    def number(
        self, key: str, default: float | None = None, *, may_be_0: bool = False, above: float = 0.0, most: float = inf
    ) -> float:
        """Take a finite number above `above`, or 0 where it may be; None as default: it has to be there.

        Raises:
            ValueError: it is not there, or is no such number.
        """
        if default is not None and not self.has(key):
            return default
        text = self.text(key)
        value = _float(text)
        if value is None or not (above < value <= most or (may_be_0 and value == 0)) or value == inf:
            least = ", 0 or more" if may_be_0 else f" above {above:g}"
            limit = "" if most == inf else f" and at most {most:g}"
            raise self._error(f"{key}={text} is not usable: it must be a number{least}{limit}")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**40) -> int:
        """Take a whole number from `least` to `most`; None as default: it has to be there.

        Raises:
            ValueError: it is not there, or is no such number.
        """
        if default is not None and not self.has(key):
            return default
        text = self.text(key)
        value = _whole(text)
        if value is None or not least <= value <= most:
            limit = "" if most == 2**40 else f" and at most {most}"
            raise self._error(f"{key}={text} is not usable: it must be a whole number, {least} or more{limit}")
        return value

    def seed(self) -> int:
        """Take the seed of a generator, 0 by default."""
        return self.count("seed", 0, least=0)

    def span(self, key: str, *, most: int = 2**24) -> Span:
        """Take a whole number, or two as in 100-900, from 1 on.

        Raises:
            ValueError: it is not there, or is no such span.
        """
        text = self.text(key)
        low, sign, high = text.partition("-")
        begin, end = _whole(low), _whole(high if sign else low)
        if begin is None or end is None or not 1 <= begin <= end <= most:
            raise self._error(
                f"{key}={text} is not usable: give a whole number from 1 to {most}, or a span as in 100-900"
            )
        return begin, end

    def check_requests(self, expected: float) -> None:
        """Raise a ValueError if a load of so many requests would never end."""
        if not expected <= MOST_REQUESTS:
            raise self._error(f"{expected:.3g} requests are more than the {MOST_REQUESTS:,} that can be simulated")

    def check_all_taken(self) -> None:
        """Raise a ValueError if an option is left that nobody has taken."""
        for key in self._values:
            raise self._error(f"there is no {key}={_nearest(key, self._known)}")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"load {self._load!r}: {what}.")


def _nearest(key: str, known: Iterable[str]) -> str:
    names = sorted(set(known))
    close = get_close_matches(key, names, 1)
    return f": the nearest is {close[0]}=" if close else f": there are {', '.join(names)}"


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
