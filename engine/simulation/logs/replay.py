"""Replays a decision log: the recorded events through a fresh scheduler, decision by decision."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from os import PathLike
from typing import IO, Any

import msgspec

from ...metrics.metrics import RequestLog
from ...protocol.actions import Action, Finish, FinishReason
from ...protocol.events import Arrived, Event
from ...protocol.stamps import Stamp
from ...scheduler.decision_log import Entry, Header, entries, opened, read_header
from ...scheduler.notes import Note
from ...scheduler.policy import POLICIES, Policy, policy_named
from ...scheduler.request import Request
from ...scheduler.scheduler import Scheduler

_NOTHING = object()  # where a list is shorter than the other
_WIDTH = 200  # of a value in a message


class DivergedError(Exception):
    """A replay decided otherwise than the log says, or for other reasons; `line` counts from 1."""

    def __init__(
        self, name: str, line: int, what: str, expected: Sequence[Action | Note], actual: Sequence[Action | Note]
    ) -> None:
        """Name the first difference between `expected`, the actions or notes (`what`) of that line, and `actual`, those
        of the replay."""
        where, was, now = _difference(what, list(expected), list(actual))
        super().__init__(
            f"{name} diverges at line {line}: {where} was {was} when it was recorded and is {now} now; "
            "replay it with the version that wrote it."
        )
        self.line, self.expected, self.actual = line, expected, actual


@dataclass
class Replay:
    """A log that was replayed to its end, with the same decisions all along."""

    name: str  # of the log
    header: Header
    scheduler: Scheduler  # as it was at the end
    events: int = 0  # how many it took in
    decisions: int = 0  # how many actions it gave out
    finished: dict[int, FinishReason] = field(default_factory=dict)  # requests that ended, and how
    ended: RequestLog = field(default_factory=RequestLog)  # their counts and timelines
    _running: dict[int, Request] = field(default_factory=dict)
    _notes: deque[Note] = field(default_factory=deque)  # made, and not met in the log yet

    def take(self, event: Event) -> None:
        """Pass one more event to the scheduler."""
        self.events += 1
        self.scheduler.on(event)
        self._notes += self.scheduler.take_notes()
        if isinstance(event, Arrived):
            self._running[event.facts.id] = self.scheduler.requests[event.facts.id]

    def decide(self) -> list[Action]:
        """Return the scheduler's decisions at this point, and count them."""
        actions = self.scheduler.actions()
        self._notes += self.scheduler.take_notes()
        self.decisions += len(actions)
        for action in actions:
            if isinstance(action, Finish):
                self.finished[action.request_id] = action.reason
                request = self._running.pop(action.request_id)
                self.ended.add(request.timeline, request.confirmed, action.reason, request.slo, request.prompt_len)
        return actions

    def take_notes(self, most: int | None = None) -> list[Note]:
        """Return the notes, at most so many, that the scheduler has made since they were last returned."""
        return [self._notes.popleft() for _ in range(len(self._notes) if most is None else min(most, len(self._notes)))]


def replay(
    source: str | PathLike[str] | IO[str],
    policy: Policy | None = None,
    each: Callable[[Scheduler], None] | None = None,
) -> Replay:
    """Pass the log's events to a new scheduler and compare what it decides. A torn last line is ignored.

    `policy` is the one under which the run was recorded; None: the log names one of Twinmesh's own. `each` is shown the
    scheduler after each of its decisions.

    Raises:
        DivergedError: the scheduler decides otherwise.
        ValueError: this is no decision log, or of another version, or damaged before its last line.
        OSError: the file cannot be read.
    """
    with opened(source) as (name, lines):
        result = _begin(name, next(lines, ""), policy)
        for _, entry in _replayed(result, lines):
            if each is not None and isinstance(entry, list):
                each(result.scheduler)
    return result


def replaying(
    source: str | PathLike[str] | IO[str], policy: Policy | None = None
) -> Iterator[tuple[Replay, Entry | None]]:
    """Replay as `replay` does, and yield each line's content when it was taken in or compared, with the replay so far;
    first None, for the header. What came of a line is seen in the scheduler until the next is asked for."""
    with opened(source) as (name, lines):
        result = _begin(name, next(lines, ""), policy)
        yield result, None
        yield from _replayed(result, lines)


def _begin(name: str, line: str, policy: Policy | None) -> Replay:
    header = read_header(name, line)
    scheduler = Scheduler(header.config, header.pools, policy or _policy_of(header, name), header.costs)
    scheduler.keep_notes()
    return Replay(name, header, scheduler)


def _replayed(result: Replay, lines: Iterable[str]) -> Iterator[tuple[Replay, Entry]]:
    for number, entry in entries(result.name, lines):
        _replay_line(result, result.name, number, entry)
        yield result, entry


def _replay_line(result: Replay, name: str, number: int, entry: Entry) -> None:
    """Take an event in, or compare actions or a note; stamps are skipped. Notes come behind what they belong to."""
    if isinstance(entry, Stamp):
        return
    if isinstance(entry, Note):
        if (made := result.take_notes(1)) != [entry]:
            raise DivergedError(name, number, "notes", [entry], made)
        return
    if left := result.take_notes():
        raise DivergedError(name, number, "notes", [], left)
    if not isinstance(entry, list):
        result.take(entry)
    elif entry != (actual := result.decide()):
        raise DivergedError(name, number, "actions", entry, actual)


def _policy_of(header: Header, name: str) -> Policy:
    if header.policy not in POLICIES:
        raise ValueError(
            f"{name} was recorded under the policy {header.policy!r}, which Twinmesh does not have: hand it to "
            "`replay` as `policy`."
        )
    return policy_named(header.policy)


def _difference(where: str, was: Any, now: Any) -> tuple[str, str, str]:
    """Find the first place where two values differ, and what each has there."""
    for name, old, new in _parts(was, now):
        if old != new:
            return _difference(where + name, old, new)
    return where, _brief(was), _brief(now)


def _parts(was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of every part of two values; none where their types differ or have no parts."""
    if type(was) is not type(now):
        return
    if isinstance(was, msgspec.Struct):
        for name in was.__struct_fields__:
            yield f".{name}", getattr(was, name), getattr(now, name)
    elif isinstance(was, list | tuple):
        for index, (old, new) in enumerate(zip_longest(was, now, fillvalue=_NOTHING)):
            yield f"[{index}]", old, new


def _brief(value: Any) -> str:
    text = "nothing" if value is _NOTHING else repr(value)
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
