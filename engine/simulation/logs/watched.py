"""Requests of a logged run, watched in its replay: what each waited for, by the scheduler, until its first token.

The scheduler is looked at after each of its decisions; what it says then holds until it is asked next. Only the
requests that are asked for are watched, so a replay with many that wait takes no longer than without.
"""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from os import PathLike
from typing import IO, Literal

from ...scheduler.policy import Policy
from ...scheduler.request import Request, State
from ...scheduler.scheduler import Scheduler
from .logged_run import LoggedRun
from .replay import replay

# Why a request is not placed; "placed": it is, and a step of it is under way or the next thing to come.
Why = Literal["held", "prefix", "seat", "pages", "credit", "placed"]


@dataclass
class Watched:
    """What became of one request until its first token."""

    states: list[tuple[float, Why]] = field(default_factory=list)  # from when on
    awaited: list[int] = field(default_factory=list)  # requests that computed what it shares
    restarts: int = 0

    def state_at(self, t: float) -> Why | None:
        """Return why it waited at `t`; None: it was not there yet."""
        place = bisect_right(self.states, t, key=lambda pair: pair[0]) - 1
        return self.states[place][1] if place >= 0 else None


class Watch:
    """Watches requests, and which meshes prefill."""

    def __init__(self, ids: Collection[int], waits: dict[int, float]) -> None:
        """`waits`: until when each of `ids` waits for its first token."""
        self.requests = {id_: Watched() for id_ in ids}
        self._waits = waits
        self._left = set(ids)
        self._prefills: list[tuple[float, tuple[bool, ...]]] = []

    def prefills_at(self, mesh: int, t: float) -> bool:
        """Return whether a mesh took prompts at `t`."""
        place = bisect_right(self._prefills, t, key=lambda pair: pair[0]) - 1
        return self._prefills[max(0, place)][1][mesh]

    def look(self, scheduler: Scheduler) -> None:
        """Look at the scheduler after a decision."""
        now = scheduler.costs.now
        prefills = tuple([mesh.prefills for mesh in scheduler.meshes])
        if not self._prefills or self._prefills[-1][1] != prefills:
            self._prefills.append((now, prefills))
        room: Why | None = None  # what is missing, the same for all that find no room
        for id_ in list(self._left):
            request = scheduler.requests.get(id_)
            if request is None or request.confirmed:
                if now >= self._waits[id_]:
                    self._left.discard(id_)
                continue
            why = _why(scheduler, request) or room
            if why is None:
                why = room = _missing(scheduler)
            watched = self.requests[id_]
            watched.restarts = request.restarts
            if not watched.states or watched.states[-1][1] != why:
                watched.states.append((now, why))
            leader = _leader(scheduler, request)
            if leader is not None and leader not in watched.awaited:
                watched.awaited.append(leader)


def watch_run(
    run: LoggedRun, source: str | PathLike[str] | IO[str], ids: Collection[int], policy: Policy | None = None
) -> Watch:
    """Replay a log and watch these requests, which have a first token; raises as `replay` does."""
    watch = Watch(ids, {id_: run.requests[id_].first_token or 0.0 for id_ in ids})
    replay(source, policy, watch.look)
    return watch


def _why(scheduler: Scheduler, request: Request) -> Why | None:
    """Return why a request is not placed; None: there is no room."""
    if request.state is not State.WAITING:
        return "placed"
    if request.sleeps_for is not None:
        return "prefix"
    if scheduler.is_held and not request.restarts:
        return "held"
    return None


def _missing(scheduler: Scheduler) -> Why:
    """Return what the meshes that prefill have too little of."""
    meshes = [mesh for mesh in scheduler.meshes if mesh.prefills]
    if all(mesh.pages.slots.num_free == 0 for mesh in meshes):
        return "seat"
    return "credit" if any(mesh.is_backed_up for mesh in meshes) else "pages"


def _leader(scheduler: Scheduler, request: Request) -> int | None:
    """Find the request that computes what this one waits for."""
    awaited = request.sleeps_for
    if awaited is None or isinstance(awaited, int):
        return awaited
    for mesh in scheduler.meshes:
        for other in mesh.placed:
            if other.state is State.PREFILL and awaited in other.hashes:
                return other.id
    return None
