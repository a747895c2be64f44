"""A logged run as tracks with slices on them: what each mesh did and when. How a viewer wants it is elsewhere
(`perfetto_file.py`).

Times are seconds on the engine's clock, those of the log's stamps. Invariant: slices of one track nest or do not touch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ...protocol.actions import Decode, Prefill
from .logged_run import LoggedRun, LoggedStep


@dataclass(frozen=True)
class Track:
    """A row of the timeline."""

    name: str
    group: str  # under which it stands, as in "meshes"
    order: int  # within its group


@dataclass(frozen=True)
class Slice:
    """Something that takes time on a track, or none."""

    track: Track
    name: str
    begin: float
    end: float
    notes: tuple[tuple[str, int | float | str], ...] = ()  # shown when it is looked at
    flows_out: tuple[int, ...] = ()  # numbers of arrows that begin here
    flows_in: tuple[int, ...] = ()  # and of those that end here; each has both ends in the run


def slices(run: LoggedRun) -> Iterator[Slice]:
    """Yield the slices of a run, track by track in no order."""
    tracks = [Track(f"mesh {mesh}", "meshes", mesh) for mesh in range(len(run.header.config.topology.meshes))]
    for step in run.steps:
        if step.stamps is not None:
            yield Slice(tracks[step.action.mesh], _name(step), step.stamps.begun, step.stamps.done, _notes(step))


def _name(step: LoggedStep) -> str:
    if isinstance(step.action, Decode):
        return "decode"
    return "prefill" if isinstance(step.action, Prefill) else "fused"


def _notes(step: LoggedStep) -> tuple[tuple[str, int], ...]:
    return (("step", step.action.step), ("chunks", len(step.chunks)), ("rows", len(step.rows)))
