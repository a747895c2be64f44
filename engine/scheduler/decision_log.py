"""A run's decisions on file, and their replay: the same events give the same actions, without model or device.

The log is text, one JSON value on each line. First an object with the version and what made the scheduler; then, in the
order in which things happened, an object for each event and an array of actions for each call of `Scheduler.actions`.
A call that gave nothing is recorded too, as `[]`: when it was made matters. What comes many times over (outcomes,
chunks, rows) is written as arrays of its fields, which takes half the time and space of objects.

Invariants: a line is flushed as soon as it is written, so that a killed run leaves a log, at worst with a torn last
line; an event is written before the scheduler sees it, so that one that makes it raise does so again in the replay.
Tokens and results are not in the log, and requests that are running when an engine closes are running at its end.
Control-plane module: no JAX here.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from os import PathLike, fspath
from types import GenericAlias
from typing import IO, Any, get_type_hints

from cattrs.preconf.json import JsonConverter, make_converter
from cattrs.strategies import configure_tagged_union

from ..config import EngineConfig, PoolSize
from ..protocol.actions import Action, Chunk, DecodeRow
from ..protocol.events import Event, Outcome
from .policy import FCFS, Policy
from .scheduler import Scheduler

VERSION = 1
_FORMAT = "twinmesh decision log"


@dataclass(frozen=True)
class Header:
    """The first line: all that a scheduler is made of."""

    format: str
    version: int
    config: EngineConfig
    pools: tuple[PoolSize, ...]


def _make_converter() -> JsonConverter:
    converter = make_converter(forbid_extra_keys=True)
    for row in (Outcome, Chunk, DecodeRow):
        _write_as_array(converter, row)
    configure_tagged_union(Event, converter, tag_name="event")
    configure_tagged_union(Action, converter, tag_name="action")
    return converter


def _write_as_array(converter: JsonConverter, row: type[Any]) -> None:
    hints = get_type_hints(row)
    array: Any = GenericAlias(tuple, tuple(hints.values()))
    values, encode = attrgetter(*hints), converter.get_unstructure_hook(array)
    converter.register_unstructure_hook(row, lambda value: encode(values(value)))
    converter.register_structure_hook(row, lambda value, _: row(*converter.structure(value, array)))


_CONVERTER = _make_converter()
# Nothing that is logged holds itself, which json need not look for.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class DecisionLog:
    """A log being written."""

    def __init__(self, target: str | PathLike[str] | IO[str]) -> None:
        """`target`: a path, where an earlier file is overwritten, or an open text file, which stays open.

        Raises:
            OSError: the file cannot be written.
        """
        self._is_mine = isinstance(target, str | PathLike)
        # It is open as long as the engine is, until `close`.
        self._file = open(target, "w", encoding="utf-8") if isinstance(target, str | PathLike) else target  # noqa: SIM115

    def begin(self, config: EngineConfig, pools: Sequence[PoolSize]) -> None:
        """Write the header. Comes first, once."""
        self._write(Header(_FORMAT, VERSION, config, tuple(pools)), Header)

    def event(self, event: Event) -> None:
        """Write what the scheduler is about to be told."""
        self._write(event, Event)

    def actions(self, actions: Sequence[Action]) -> None:
        """Write what it answered."""
        self._write(actions, Sequence[Action])

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        if self._is_mine:
            self._file.close()

    def _write(self, value: object, kind: Any) -> None:
        self._file.write(_encode(_CONVERTER.unstructure(value, unstructure_as=kind)) + "\n")
        self._file.flush()


class RecordingScheduler(Scheduler):
    """A scheduler that writes a log of what it hears and says."""

    def __init__(self, config: EngineConfig, pools: Sequence[PoolSize], log: DecisionLog, policy: Policy = FCFS):
        """`pools[i]` is the size of mesh i's KV memory. The log is the caller's to close."""
        super().__init__(config, pools, policy)
        self._log = log
        log.begin(config, pools)

    def on(self, event: Event) -> None:
        """Take in what happened, and record it."""
        self._log.event(event)
        super().on(event)

    def actions(self) -> list[Action]:
        """Everything that can be dispatched now, in order; recorded."""
        actions = super().actions()
        self._log.actions(actions)
        return actions


def read_line(line: str) -> Event | list[Action]:
    """What a line after the header holds: an event, or the actions of one call. Raises many things if it is damaged."""
    value = json.loads(line)
    # mypy has no type for a union that is a value.
    kind: Any = list[Action] if isinstance(value, list) else Event
    return _CONVERTER.structure(value, kind)  # type: ignore[no-any-return]


def _read_header(name: str, line: str) -> Header:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{name} is no decision log: its first line is not the header of one.")
    if value.get("version") != VERSION:
        raise ValueError(
            f"{name} is a decision log of version {value.get('version')!r}, and this Twinmesh reads version {VERSION}: "
            "replay it with the version that wrote it."
        )
    try:
        header = _CONVERTER.structure(value, Header)
        if len(header.pools) != len(header.config.topology.meshes):
            raise ValueError("not one pool for each mesh")
    except Exception as error:  # as above
        raise ValueError(f"{name} is damaged at line 1: its configuration cannot be read.") from error
    return header


@contextmanager
def _opened(source: str | PathLike[str] | IO[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """What to call it, and its lines."""
    if isinstance(source, str | PathLike):
        # A byte that is no text makes its line unreadable, not the file.
        with open(source, encoding="utf-8", errors="replace") as file:
            yield fspath(source), file
    else:
        yield str(getattr(source, "name", "the log")), iter(source)
