"""Batch files on top of the API: `run` and `Batch`."""

from .session import Batch, run

__all__ = ["Batch", "run"]
