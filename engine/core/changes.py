"""Changes of the whole engine that callers wait for: new parameters, and new roles of a pool's meshes.

Invariants: changes begin in the order in which they were asked for; parameters wait until no roles are changing, and
the reverse; calls for roles that follow each other run together, and the scheduler says which is superseded. Every
change is answered once, with the engine's end if need be. Only the dispatching thread calls this.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from ..protocol.actions import RolesOutcome, RolesSettled
from ..protocol.events import Hold, Resume, SetRoles
from ..protocol.executor import Executor
from ..roles import NAMES, Goal, as_text
from ..scheduler.scheduler import Scheduler


@dataclass(eq=False, kw_only=True)
class Change:
    """What a caller waits for: `done` is set once it is in place or, with an `error`, never will be."""

    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None  # why the engine has ended first

    def refuse(self, why: str) -> None:
        """End the caller's wait: the engine has ended."""
        self.error = why
        self.done.set()


@dataclass(eq=False)
class NewParams(Change):
    """A call of `update_params`."""

    params: Mapping[str, object]


@dataclass(eq=False)
class NewRoles(Change):
    """A call of `set_roles`."""

    goal: Goal
    due: float  # in seconds on the engine's clock
    outcome: RolesOutcome | None = None
    why: str | None = None


@dataclass(eq=False)
class Pause(Change):
    """A call that waits until what runs has ended; nothing begins before a `Restart`."""


@dataclass(eq=False)
class Restart(Change):
    """A call that ends a pause: requests begin again, and every cached page is void."""


@dataclass(eq=False)
class Freeze(Change):
    """A call that has nothing dispatched any more, and waits for the steps that are in flight."""


class Changes:
    """The changes of one engine."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float]):
        """Begin without any; `clock` gives seconds."""
        self._scheduler, self._executor, self._clock = scheduler, executor, clock
        self._asked = deque[Change]()  # not begun
        self._params: list[NewParams] = []  # that wait for what runs to end
        self._roles: dict[int, NewRoles] = {}  # calls that the scheduler has not answered
        self._pauses: list[Pause] = []  # likewise
        self._is_held = False  # by a pause
        self._calls = count()

    def ask(self, change: Change) -> None:
        """Take in a change, and begin it unless another has to end first."""
        self._asked.append(change)
        self._begin()

    def settled(self, answer: RolesSettled) -> None:
        """Pass on the scheduler's answer to a call for roles."""
        call = self._roles.pop(answer.call)
        call.outcome, call.why = answer.outcome, answer.why
        call.done.set()

    def go_on(self) -> bool:
        """Do what has become possible; return whether the scheduler has something new to decide."""
        if not self._asked and not self._params and not self._pauses:
            return False
        self._end_late_calls()
        if self._pauses and self._scheduler.is_drained:
            for pause in self._pauses:
                pause.done.set()
            self._pauses.clear()
        if self._params and self._scheduler.is_drained:
            for change in self._params:
                self._executor.replace_params(change.params)
                change.done.set()
            self._params.clear()
            if not self._is_held:
                self._scheduler.on(Resume(self._clock()))
            self._begin()
            return True
        return self._begin()

    def next_due(self) -> float | None:
        """Return when the time of a call for roles that could not begin yet is over; None: there is none."""
        if not self._asked:
            return None
        return min([change.due for change in self._asked if isinstance(change, NewRoles)], default=None)

    def end(self, why: str) -> None:
        """Answer all that have not been, since the engine has ended."""
        for change in (*self._asked, *self._params, *self._pauses, *self._roles.values()):
            change.refuse(why)

    def _end_late_calls(self) -> None:
        """Answer calls for roles whose time is over before they could begin."""
        late = [change for change in self._asked if isinstance(change, NewRoles) and change.due <= self._clock()]
        for change in late:
            self._asked.remove(change)
            roles = as_text(mesh.role for mesh in self._scheduler.meshes)
            change.outcome, change.why = "late", (
                "the roles were not reached in time: new parameters go first, and wait for requests that run; "
                f"the roles are {roles}."
            )  # fmt: skip
            change.done.set()

    def _begin(self) -> bool:
        """Begin those whose turn it is; return whether there were any."""
        has_begun = False
        while self._asked and not (self._roles if isinstance(self._asked[0], NewParams) else self._params):
            change, has_begun = self._asked.popleft(), True
            if isinstance(change, NewParams):
                self._params.append(change)
                self._scheduler.on(Hold(self._clock()))
            elif isinstance(change, NewRoles):
                self._set_roles(change)
            elif isinstance(change, Pause):
                self._pauses.append(change)
                self._is_held = True
                self._scheduler.on(Hold(self._clock()))
            else:
                self._restart(change)
        return has_begun

    def _restart(self, change: Change) -> None:
        if self._is_held:
            self._is_held = False
            if not self._params:  # which resume when they are in place
                self._scheduler.on(Resume(self._clock()))
        change.done.set()

    def _set_roles(self, change: NewRoles) -> None:
        call, goal = next(self._calls), change.goal
        self._roles[call] = change
        counts = {NAMES[role]: number for role, number in goal.counts.items()}
        meshes = {mesh: NAMES[role] for mesh, role in goal.meshes.items()}
        self._scheduler.on(SetRoles(self._clock(), call, change.due, counts, meshes))
