"""Errors that callers of the engine tell apart. No JAX here, so that commands can name them without waiting for it."""


class EngineError(RuntimeError):
    """The engine is closed, or stopped by an internal failure."""


class BatchStopped(RuntimeError):
    """A batch run that had to end early, in one sentence; what was written is kept, and the run can go on later."""
