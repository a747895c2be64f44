"""What a mesh's steps take, by their kind, as running means of what `Costs` has measured.

`Costs` has one line over all sizes, which says what work costs on the whole. This knows each bucket by itself: what a
step costs more than another of the same bucket, which is nothing for rows in its padding, no line can say.
"""

from typing import NamedTuple

_WEIGHT = 1 / 16  # of the latest step, once there have been as many


class StepKind(NamedTuple):
    """What the seconds of a step depend on."""

    tokens: int  # the bucket of its prompt chunks; 0: it has none
    rows: int  # the bucket of its decode rows; 0: likewise
    is_mixed: bool = False  # whether it serves interactive and batch requests at once


class StepSeconds:
    """The means of one mesh."""

    def __init__(self) -> None:
        self._means: dict[StepKind, float] = {}
        self._counts: dict[StepKind, int] = {}

    def add(self, kind: StepKind, seconds: float) -> None:
        """Take in what one step took."""
        self._counts[kind] = count = self._counts.get(kind, 0) + 1
        mean = self._means.get(kind, 0.0)
        self._means[kind] = mean + (seconds - mean) * max(1 / count, _WEIGHT)

    def expect(self, kind: StepKind) -> float | None:
        """Return what a step of this kind takes; None: nothing is known. Chunks alone go by others, by the token."""
        if not kind.tokens and not kind.rows:
            return 0.0
        if kind in self._means or kind.rows:
            return self._means.get(kind)
        chunks = [(other.tokens, seconds) for other, seconds in self._means.items() if other.tokens and not other.rows]
        if not chunks:
            return None
        tokens, seconds = min(chunks, key=lambda chunk: abs(chunk[0] - kind.tokens))
        return seconds * kind.tokens / tokens

    def longest(self, tokens: int) -> float:
        """Return the longest that any kind of step takes whose chunks have at most so many tokens."""
        return max((seconds for kind, seconds in self._means.items() if kind.tokens <= tokens), default=0.0)
