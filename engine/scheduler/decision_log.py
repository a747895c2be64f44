"""The decision log: a run's events and decisions on file, to be replayed without model or device.

The log is text, one JSON value on each line, in the encoding of `protocol/message.py`. First an object with the version
and what made the scheduler; then, in the order in which things happened, an object for each event and an array of
actions for each call of `Scheduler.actions`. A call that gave nothing is recorded too, as `[]`: when it was made
matters. After what they belong to come notes, an object each: why it was decided so (`notes.py`). Where an engine
writes it, there are stamps in between, an array each that begins with its kind: when it was (`protocol/stamps.py`). The
scheduler knows nothing of them.

Invariants: a line is flushed as soon as it is written, so that a killed run leaves a log, at worst with a torn last
line; an event is written before the scheduler sees it, so that one that makes it raise does so again in the replay.
Tokens and results are not in the log, and requests that are running when an engine closes are running at its end.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from os.path import expanduser
from typing import IO, Any

import msgspec

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..protocol.actions import Action
from ..protocol.events import Event
from ..protocol.stamps import Stamp
from .cost import PRIORS, Priors
from .notes import Note
from .policy import FCFS, Policy
from .scheduler import Scheduler

VERSION = 5
_FORMAT = "twinmesh decision log"


class RunFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ran, where: what no decision hangs on, and what times do."""

    model: ModelConfig
    name: str  # of the model
    device: str  # the kind of its devices


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line: all that a scheduler is made of."""

    format: str
    version: int
    config: EngineConfig
    pools: tuple[PoolSize, ...]
    policy: str  # its name
    costs: Priors = PRIORS  # what work is taken to cost until it is measured
    run: RunFacts | None = None  # None: no engine wrote it, and it has no stamps


_encode = msgspec.json.Encoder().encode
# mypy has no type for a union that is a value.
_EVENT_OR_NOTE: Any = msgspec.json.Decoder(Event | Note)
_ACTIONS: Any = msgspec.json.Decoder(list[Action])
_STAMP: Any = msgspec.json.Decoder(Stamp)

type Entry = Event | Note | Stamp | list[Action]


class DecisionLog:
    """A decision log that is being written."""

    def __init__(self, target: str | PathLike[str] | IO[str], run: RunFacts | None = None) -> None:
        """Open `target`: a path, whose earlier file is overwritten, or an open text file, which `close` leaves open.

        `run` goes into the header: of an engine that writes stamps.

        Raises:
            OSError: the file cannot be written.
        """
        self._run = run
        self._is_mine = isinstance(target, str | PathLike)
        # It is open as long as the engine is, until `close`.
        self._file = open(target, "w", encoding="utf-8") if isinstance(target, str | PathLike) else target  # noqa: SIM115

    def begin(self, config: EngineConfig, pools: Sequence[PoolSize], policy: str, costs: Priors = PRIORS) -> None:
        """Write the header: once, before anything else."""
        self._write(Header(_FORMAT, VERSION, config, tuple(pools), policy, costs, self._run))

    def event(self, event: Event) -> None:
        """Write an event, before the scheduler takes it in."""
        self._write(event)

    def actions(self, actions: Sequence[Action]) -> None:
        """Write the actions of one call."""
        self._write(actions)

    def notes(self, notes: Sequence[Note]) -> None:
        """Write notes on what was written before."""
        for note in notes:
            self._write(note)

    def stamp(self, stamp: Stamp) -> None:
        """Write a stamp."""
        self._write(stamp)

    def close(self) -> None:
        """Close the file, unless the caller opened it. Calling it again does nothing."""
        if self._is_mine:
            self._file.close()

    def _write(self, value: object) -> None:
        self._file.write(_encode(value).decode() + "\n")
        self._file.flush()


class RecordingScheduler(Scheduler):
    """A scheduler that writes a log of its events and actions."""

    def __init__(
        self,
        config: EngineConfig,
        pools: Sequence[PoolSize],
        log: DecisionLog,
        policy: Policy = FCFS,
        priors: Priors = PRIORS,
    ):
        """Begin the log with a header; the caller closes the log. The others are as for `Scheduler`."""
        super().__init__(config, pools, policy, priors)
        self._log = log
        log.begin(config, pools, policy.name, priors)
        self.keep_notes()

    def on(self, event: Event) -> None:
        """Take in what happened, and record it."""
        self._log.event(event)
        super().on(event)
        self._log.notes(self.take_notes())

    def actions(self) -> list[Action]:
        """Return everything that can be dispatched now, in order, and record it."""
        actions = super().actions()
        self._log.actions(actions)
        self._log.notes(self.take_notes())
        return actions


def read_line(line: str) -> Entry:
    """Read a line after the header: an event, the actions of one call, a note on the one or the other, or a stamp.

    Raises:
        ValueError: the line is damaged.
    """
    decoder = _STAMP if line.startswith('["') else _ACTIONS if line.startswith("[") else _EVENT_OR_NOTE
    entry: Entry = decoder.decode(line)
    return entry


def entries(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Entry]]:
    """Yield number and content of each line after the header of the log called `name`. A torn last line is ignored.

    Raises:
        ValueError: a line before the last is damaged.
    """
    for number, line in enumerate(lines, 2):
        try:
            entry = read_line(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith("\n"):
                return
            raise ValueError(f"{name} is damaged at line {number}: it cannot be read from there.") from error
        yield number, entry


def read_header(name: str, line: str) -> Header:
    """Read the first line of the log called `name`.

    Raises:
        ValueError: it is no header, of another version, or damaged.
    """
    try:
        value = msgspec.json.decode(line)
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        value = None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{name} is no decision log: its first line is not the header of one.")
    if value.get("version") != VERSION:
        raise ValueError(
            f"{name} is a decision log of version {value.get('version')!r}, and this Twinmesh reads version {VERSION}: "
            "replay it with the version that wrote it."
        )
    try:
        header = msgspec.json.decode(line, type=Header)
        if len(header.pools) != len(header.config.topology.meshes):
            raise ValueError("not one pool for each mesh")
    except ValueError as error:
        raise ValueError(f"{name} is damaged at line 1: its configuration cannot be read.") from error
    return header


@contextmanager
def opened(source: str | PathLike[str] | IO[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """Open a log; yield its name, for messages, and its lines."""
    if isinstance(source, str | PathLike):
        # A byte that is no text makes its line unreadable, not the file.
        with open(expanduser(source), encoding="utf-8", errors="replace") as file:
            yield fspath(source), file
    else:
        yield str(getattr(source, "name", "the log")), iter(source)
