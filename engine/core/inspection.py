"""Ways to look into a running engine: questions to its scheduler and executor, and observers of what it decides.

For debugging and experiments; the engine itself needs none of this. Invariant: both run on the dispatching thread, so
they see a consistent state, and what they do takes its time from the engine.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import EngineError
from ..protocol.actions import Action
from ..protocol.executor import Executor
from ..scheduler.scheduler import Scheduler


class Question:
    """A function of scheduler and executor that waits for its turn, and what it returned or raised."""

    def __init__(self, ask: Callable[[Scheduler, Any], Any]) -> None:
        self._ask, self._answer = ask, Future[Any]()

    def answer(self, scheduler: Scheduler, executor: Executor) -> None:
        """Call the function, and keep what it returns or raises for `result`."""
        try:
            self._answer.set_result(self._ask(scheduler, executor))
        except BaseException as error:  # whatever it is, the asker waits for it
            self._answer.set_exception(error)

    def refuse(self, why: str) -> None:
        """Make `result` raise an EngineError that says why: the engine has ended."""
        self._answer.set_exception(EngineError(why))

    def result(self) -> Any:
        """Wait for the answer and return it, or raise what the function raised."""
        return self._answer.result()


class Observer:
    """The base of observers, whose methods the dispatching thread calls as it works; override those of interest.

    An exception that a method raises stops the engine, as a failure of its own would.
    """

    def received(self, message: object) -> None:
        """See a message that was taken in: a tuple of submissions, an event, a step's result."""

    def deciding(self, scheduler: Scheduler) -> None:
        """See the scheduler before it decides."""

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """See what the scheduler decided, before any of it is performed."""

    def performed(self, action: Action) -> None:
        """See an action that the executor has taken."""


def _looks(seen: Callable[..., None], unseen: Callable[..., None]) -> bool:
    """Return whether an observer's method does something: it is not the one that does nothing."""
    return getattr(seen, "__func__", seen) is not unseen


class Observers(Observer):
    """All that observe one engine, as one; each sees what is seen here, in the order in which they were added."""

    def __init__(self) -> None:
        self._each: tuple[Observer, ...] = ()
        self._list()

    def add(self, observer: Observer) -> None:
        """Let an observer see what comes from here on."""
        self._each += (observer,)
        self._list()

    def remove(self, observer: Observer) -> None:
        """Let it see nothing any more."""
        self._each = tuple(other for other in self._each if other is not observer)
        self._list()

    def _list(self) -> None:
        """List for each kind of sight those who look at it: most look at one or two, and actions are many."""
        each = self._each
        self._received = [o.received for o in each if _looks(o.received, Observer.received)]
        self._deciding = [o.deciding for o in each if _looks(o.deciding, Observer.deciding)]
        self._decided = [o.decided for o in each if _looks(o.decided, Observer.decided)]
        self._performed = [o.performed for o in each if _looks(o.performed, Observer.performed)]

    def received(self, message: object) -> None:
        """Show a message to all."""
        for see in self._received:
            see(message)

    def deciding(self, scheduler: Scheduler) -> None:
        """Show the scheduler to all."""
        for see in self._deciding:
            see(scheduler)

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """Show to all what was decided."""
        for see in self._decided:
            see(scheduler, actions)

    def performed(self, action: Action) -> None:
        """Show to all what the executor has taken."""
        for see in self._performed:
            see(action)
