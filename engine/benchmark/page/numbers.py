"""Numbers as people read them: about three digits that matter, thousands apart, the unit where it is said."""

from math import ceil, floor, log10

_MINUS = "\N{MINUS SIGN}"


def plain(value: float) -> str:
    """Return a number with three digits or more, as in "0.0123", "4.56", "78.9" or "1,234"."""
    if not value:
        return "0"
    size = floor(log10(abs(value)))
    text = f"{value:,.{max(0, 2 - size)}f}" if size > -5 else f"{value:.2e}"
    return text.replace("-", _MINUS, 1) if value < 0 else text


def milliseconds(seconds: float) -> str:
    """Return seconds as a number of milliseconds, without the unit."""
    return plain(1000 * seconds)


def duration(seconds: float) -> str:
    """Return seconds with the unit that suits them."""
    return f"{plain(seconds)} s" if seconds >= 1 else f"{milliseconds(seconds)} ms"


def percent(share: float) -> str:
    """Return a share of 0 to 1 in percent, as in "99.8 %"."""
    value = 100 * share
    return f"{value:.0f} %" if value == round(value) else f"{value:.2f} %" if value > 99 else f"{value:.1f} %"


def change(before: float, after: float) -> str:
    """Return by what share a value has changed, as in "+3.2 %"."""
    share = 100 * (after / before - 1)
    return f"{share:+,.1f} %".replace("-", _MINUS)


def count(number: int, noun: str) -> str:
    """Return a number and its noun, as in "1 request" or "2,000 requests"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ticks(least: float, most: float) -> tuple[list[float], list[str]]:
    """Return places and texts of ticks of a logarithmic axis: 1, 2 and 5, or powers of ten where it is long."""
    steps = (1, 2, 5) if log10(most / least) < 2.5 else (1,)
    places = [
        step * 10.0**power for power in range(floor(log10(least)), ceil(log10(most)) + 1) for step in steps
    ]  # fmt: skip
    return places, [f"{place:,.10g}" for place in places]
