"""Presets: loads shaped like benchmarks that the field knows, as data. None of them is that benchmark: whoever runs one
gets unofficial figures, and the report says so.

A length is in tokens and drawn uniformly from its span, both ends included; the model's own end is ignored, so that
answers have the length that was asked for. What the published procedures fix besides is in the fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..simulation.loads.lengths import Span

_POWERS = tuple(2**power for power in range(11))  # 1 to 1,024


@dataclass(frozen=True)
class Sweep:
    """Closed loops, one concurrency after the other: so many users, each with one request at a time."""

    name: str
    shaped_like: str
    prompt: Span
    output: Span
    concurrencies: tuple[int, ...]  # ascending
    requests_per_user: int  # of a point; where `seconds` end it first, more than can be answered
    warmups_per_user: int = 0  # before each point, not counted
    seconds: float | None = None  # of a point; None: until all requests are answered
    flat: float | None = None  # it ends when output tokens/s grow by less than this share; None: after the last
    asks_accuracy: bool = False  # after each point, on the same engine


def _inferencex(name: str, setting: str, prompt: int, output: int) -> Sweep:
    """InferenceX: lengths between 0.8 L and L, 10 C requests and 2 C warm-ups at each concurrency C."""
    spans = [(round(0.8 * length), length) for length in (prompt, output)]
    return Sweep(name, f"InferenceX, {setting}", spans[0], spans[1], (4, 8, 16, 32, 64), 10, 2)


PRESETS: Mapping[str, Sweep] = {
    preset.name: preset
    for preset in (
        _inferencex("inferencex", "8k/1k", 8192, 1024),
        _inferencex("inferencex-1k1k", "1k/1k, an archived setting, retired in July 2026", 1024, 1024),
        Sweep(
            "aa-load", "Artificial Analysis' load test, phases of 3 minutes, 1000/1000", (1000, 1000), (1000, 1000),
            _POWERS, requests_per_user=500, seconds=180.0, flat=0.05,
        ),
    )
}  # fmt: skip


def scaled(sweep: Sweep, scale: float) -> Sweep:
    """Return a sweep whose lengths and times are multiplied by `scale`, above 0 and at most 1; lengths stay at 1 or
    more tokens, and concurrencies as they are."""

    def length(span: Span) -> Span:
        return max(1, round(span[0] * scale)), max(1, round(span[1] * scale))

    seconds = None if sweep.seconds is None else sweep.seconds * scale
    return replace(sweep, prompt=length(sweep.prompt), output=length(sweep.output), seconds=seconds)
