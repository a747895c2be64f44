"""Errors that callers of the engine tell apart. No JAX here, so that commands can name them without waiting for it."""


class EngineError(RuntimeError):
    """The engine is closed, or stopped by an internal failure."""


class Overloaded(RuntimeError):
    """So many requests wait already that no more are let in; `retry_after` says in how many seconds to try again."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            f"as many requests wait as max_waiting and max_waiting_tokens allow: try again in {retry_after:.1f} s."
        )
        self.retry_after = retry_after


class BatchStopped(RuntimeError):
    """A batch run that had to end early, in one sentence; what was written is kept, and the run can go on later."""
