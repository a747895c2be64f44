"""A run's timeline from its decision log: meshes, requests, roles and counters, drawn while the log is replayed.

The log's lines say what happened and its stamps when; what the scheduler knew in between, such as whose KV a transfer
moves or which mesh took a role, the replay knows. It holds what is under way and no more, so a log may have any length.
"""

from collections.abc import Iterator
from os import PathLike
from typing import IO

from ...protocol.actions import Finish
from ...scheduler.policy import Policy
from .mesh_timeline import MeshTimeline
from .replay import Replay, replaying
from .request_timeline import RequestTimeline
from .role_timeline import RoleTimeline
from .timeline_tracks import Mark

_FIRST_MESH = 10  # among the tracks, behind the few that belong to none


def timeline(source: str | PathLike[str] | IO[str], policy: Policy | None = None) -> Iterator[Mark]:
    """Yield the marks of a logged run; `policy` is as for `replay`. A torn last line is ignored.

    Raises:
        DivergedError: the log does not replay.
        ValueError: this is no decision log, or of another version, or damaged before its last line; or it has no
            stamps, or no request.
        OSError: the file cannot be read.
    """
    entries = replaying(source, policy)
    replay, _ = next(entries)
    if replay.header.run is None:
        raise ValueError(
            f"{replay.name} has no times of requests and steps: a scheduler without an engine wrote it. Take the log "
            "of an engine, as `LLM(..., decision_log=...)` writes it."
        )
    drawing = _Drawing(replay)
    for _, entry in entries:
        drawing.take(entry)
        yield from drawing.taken()
    if not drawing.has_requests:
        raise ValueError(f"{replay.name} has no request: there is nothing to draw.")
    drawing.end()
    yield from drawing.taken()


class _Drawing:
    """A timeline that is being drawn."""

    def __init__(self, replay: Replay) -> None:
        """Begin before the first event."""
        self._replay, self._scheduler = replay, replay.scheduler
        self._marks: list[Mark] = []
        self.has_requests = False
        scheduler, emit = replay.scheduler, self._marks.append
        self._requests = RequestTimeline(scheduler, emit, 0)
        self._meshes = MeshTimeline(scheduler, emit, _FIRST_MESH)
        groups = [self._meshes.group(mesh.index) for mesh in scheduler.meshes]
        self._roles = RoleTimeline(scheduler, emit, groups, _FIRST_MESH - 1)

    @property
    def _now(self) -> float:
        return self._scheduler.costs.now

    def take(self, entry: object) -> None:
        """Draw one line of the log, which the scheduler has taken in."""
        now = self._now
        if isinstance(entry, list):
            self._meshes.decided(entry, now)
            self._requests.decided(entry, now)
            self._roles.decided(entry, now)
            self._roles.look(now)
            if any(isinstance(action, Finish) for action in entry):
                self._replay.finished.clear()  # of which nobody asks
        else:
            self._meshes.happened(entry, now)
            self._requests.happened(entry, now)
            self._roles.happened(entry, now)
            self._meshes.stamped(entry)
            self._requests.stamped(entry)
        self.has_requests = self.has_requests or bool(self._scheduler.requests)

    def taken(self) -> list[Mark]:
        """Return the marks since this was called last."""
        marks = self._marks.copy()
        self._marks.clear()
        return marks

    def end(self) -> None:
        """End what is open."""
        self._meshes.end(self._now)
        self._requests.end(self._now)
        self._roles.end(self._now)
