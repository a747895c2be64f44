"""When what the decision log tells of really happened: stamps beside its events and actions, for those who ask why.

A replay needs none of them and skips them; nothing is decided by them. All times are in seconds on the engine's clock,
those of one stamp in the order of its fields unless something failed. In the log a stamp is an array that begins with
its kind. To add a kind: a class here, in `Stamp`.
"""

from .message import Row


class RequestStamps(Row, frozen=True):
    """A request entered. Its `Arrived` says when it was called for."""

    request_id: int
    tokenised: float  # its prompt was checked and is tokens
    entered: float  # it was given to the engine: its turn had come, where it is one of many
    accepted: float  # the dispatching thread took it in
    # The request whose end it waited for, where its caller keeps so many at once: it came when that one was over, not
    # at a time of its own. None: it did.
    after: int | None = None


class StepStamps(Row, frozen=True):
    """A step was read, and when it was where. Steps that a lost mesh took along have none."""

    mesh: int
    step: int
    decided: float  # the scheduler was asked for what it is part of
    dispatched: float  # it was given to its devices
    begun: float  # its devices could begin: they had it, and had done the step before it
    done: float  # its result was there
    read: float  # the dispatching thread took its tokens in


class TransferStamps(Row, frozen=True):
    """A transfer arrived."""

    transfer: int
    source: int
    destination: int
    size: int  # bytes of KV and state
    sent: float  # it was given to its devices
    begun: float  # they could begin: the step before it on its source was done
    arrived: float
    read: float  # the dispatching thread took it in


Stamp = RequestStamps | StepStamps | TransferStamps
