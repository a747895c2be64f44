"""One line on stderr that says how far something has come: bytes of weights, programs compiled, lines of a batch.

On a terminal it is written over again, at most ten times a second, and stays where it ends. Where stderr is a file or a
pipe, a whole line comes every ten seconds and nothing else. Any thread may advance it. Invariant: it never ends what it
tells of: what cannot be written is left out. It has no thread: what stands still writes nothing.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

# Seconds between two updates, on a terminal and elsewhere.
ON_TERMINAL, ELSEWHERE = 0.1, 10.0
_WIDTH = 80  # of a terminal that does not say


class Progress:
    """A count on its way to a total, in one line; to be used as a context manager."""

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "",
        *,
        shown: bool = True,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count; nothing is written before the first `advance`.

        Args:
            what: the line's first words.
            total: what is counted to; None: unknown.
            unit: what is counted, in the plural; "B" shows megabytes or gigabytes.
            shown: False: nothing is written at all.
            done: what was there before, which says nothing of how long the rest takes.
            stream: where it is written; stderr, unless that is closed.
            clock: gives seconds.
        """
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = done
        self._stream = (stream or sys.stderr) if shown else None
        self._on_terminal = self._stream is not None and is_terminal(self._stream)
        self._every = ON_TERMINAL if self._on_terminal else ELSEWHERE
        self._clock, self._lock = clock, threading.Lock()
        self._start = clock()
        self._drawn_at = -math.inf if self._on_terminal else self._start
        self._drawn = ""  # on the terminal's last line
        self._note, self._doing = "", dict[str, int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line, so that what is written next has one of its own; on a terminal it says how far it came."""
        with self._lock:
            if self._stream is not None and self._drawn:
                self._draw(self._text(is_over=True), end="\n")
            self._stream = None

    def advance(self, count: int, note: str | None = None) -> None:
        """Count further, and say `note` besides from here on; None: as before."""
        with self._lock:
            self._done += count
            self._note = self._note if note is None else note
            self._update()

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Name something in the line while it is done; it counts as one when it is."""
        with self._lock:
            self._doing[name] = self._doing.get(name, 0) + 1
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._doing[name] -= 1
                if not self._doing[name]:
                    del self._doing[name]
                self._done += 1
                self._update()

    def _update(self) -> None:
        now = self._clock()
        if self._stream is not None and now - self._drawn_at >= self._every:
            self._drawn_at = now
            self._draw(self._text(), end="" if self._on_terminal else "\n")

    def _draw(self, text: str, end: str) -> None:
        assert self._stream is not None
        try:
            if self._on_terminal:
                text = text[: _width(self._stream) - 1]
                text, self._drawn = "\r" + text.ljust(len(self._drawn)), text
            self._stream.write(text + end)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            self._stream = None

    def _text(self, *, is_over: bool = False) -> str:
        parts = [f"{self._what}: {amount(self._done, self._total, self._unit)}"]
        if self._note:
            parts.append(self._note)
        if self._doing and not is_over:
            parts.append(", ".join(self._doing))
        seconds, counted = self._clock() - self._start, self._done - self._before
        if is_over:
            parts.append(duration(seconds))
        elif self._total and counted > 0 and seconds > 0:
            parts.append(f"{duration(seconds * (self._total - self._done) / counted)} left")
        return ", ".join(parts)


def amount(done: int, total: int | None, unit: str) -> str:
    """Return "7 of 22 programs" or "45 of 98 MB"."""
    if unit == "B":
        size, unit, digits = (1e9, "GB", 2) if (total or done) >= 1e10 else (1e6, "MB", 0)
        of = "" if total is None else f" of {total / size:,.{digits}f}"
        return f"{done / size:,.{digits}f}{of} {unit}"
    of = "" if total is None else f" of {total:,}"
    return f"{done:,}{of} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Return "3.2 s", "4:05" or "1:04:05"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str) -> None:
    """Write a line to stderr; one that cannot be written is left out."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is shown to somebody as it is written."""
    try:
        return stream.isatty()
    except ValueError:  # it is closed
        return False


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _WIDTH
    except (OSError, ValueError):
        return _WIDTH
