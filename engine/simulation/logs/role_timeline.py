"""The roles of a pool's meshes, each change with its reason, and what the planner found. Nothing of an engine whose
meshes keep their roles."""

from collections.abc import Callable, Sequence
from typing import cast

from msgspec.structs import asdict

from ...core.role_changes import RoleChanges
from ...protocol.actions import Action, RolesSettled
from ...protocol.events import SetRoles
from ...scheduler.notes import Planned
from ...scheduler.planner import SENTENCES, Reason
from ...scheduler.scheduler import Scheduler
from .timeline_tracks import Begin, End, Instant, Mark, Notes, Track


class RoleTimeline:
    """The roles of one run."""

    def __init__(self, scheduler: Scheduler, emit: Callable[[Mark], None], groups: Sequence[Track], order: int) -> None:
        """Begin before the first event, with a track in the first place of each mesh's group, and one at `order` for
        decisions."""
        self._scheduler, self._emit = scheduler, emit
        self._changes, self._drawn = RoleChanges(scheduler, 0.0), 0
        self._is_pool = scheduler.config.topology.is_pool
        self._decisions = Track("roles and plans", None, order)
        self._tracks = [Track("role", group, 0) for group in groups]
        self._shown, self._has_begun = scheduler.roles(), False

    def look(self, now: float) -> None:
        """Draw what roles have changed, or drained, since this was called last."""
        if not self._is_pool:
            return
        if not self._has_begun:
            self._has_begun = True
            for track, role in zip(self._tracks, self._shown, strict=True):
                self._emit(Begin(track, now, role))
        shown = self._scheduler.roles()
        if shown == self._shown:
            return
        self._changes.look(self._scheduler, now)
        flips = {flip.mesh: flip for flip in self._changes.flips[self._drawn :]}
        self._drawn = len(self._changes.flips)
        for mesh, (before, after) in enumerate(zip(self._shown, shown, strict=True)):
            if before == after:
                continue
            notes: Notes = ()
            if mesh in flips:
                notes = (("before", flips[mesh].before), ("reason", flips[mesh].reason))
                name = f"mesh {mesh}: {flips[mesh].before} to {flips[mesh].after}"
                self._emit(Instant(self._decisions, now, name, (("reason", flips[mesh].reason),)))
            self._emit(End(self._tracks[mesh], now))
            self._emit(Begin(self._tracks[mesh], now, after, notes))
        self._shown = shown

    def happened(self, entry: object, now: float) -> None:
        """Draw calls for roles, and plans."""
        if isinstance(entry, SetRoles):
            counts = [f"{role}={count}" for role, count in entry.counts.items()]
            text = ", ".join([*counts, *(f"mesh {mesh}={role}" for mesh, role in entry.meshes.items())])
            self._emit(Instant(self._decisions, now, f"called for {text}"))
        elif isinstance(entry, Planned):
            values = {name: value for name, value in asdict(entry).items() if value is not None}
            said = tuple((name, str(value) if isinstance(value, tuple) else value) for name, value in values.items())
            name = f"plan: {entry.reason}"
            self._emit(Instant(self._decisions, now, name, (("means", SENTENCES[cast("Reason", entry.reason)]), *said)))

    def decided(self, actions: Sequence[Action], now: float) -> None:
        """Draw answers to calls for roles."""
        for action in actions:
            if isinstance(action, RolesSettled):
                notes: Notes = () if action.why is None else (("why", action.why),)
                self._emit(Instant(self._decisions, now, f"roles {action.outcome}", notes))

    def end(self, now: float) -> None:
        """End what is open when the log ends."""
        if self._has_begun:
            for track in self._tracks:
                self._emit(End(track, now))
