"""What ran on meshes and when, and of each step for how long others computed beside it: a pure function of times."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from ...protocol.actions import Decode, Fused, Prefill
from .measured import Beside, MeasuredStep, measured_step


class Ran(NamedTuple):
    """A step that was run, in seconds on the engine's clock."""

    action: Prefill | Decode | Fused
    begin: float
    end: float
    is_queued: bool  # it was dispatched before its mesh had done the step before it
    gathered: int = 0  # bytes that its mesh was to gather between the step before it and this one
    scattered: int = 0  # and to scatter


def measured_steps(ran: Sequence[Ran]) -> list[MeasuredStep]:
    """Return what each step says about costs, in the order given; steps of one mesh follow each other there.

    A time is from the dispatch of a step, or the end of the one before it, to its end; the first includes what the host
    takes (`MeasuredStep.is_queued` tells them apart).
    """
    by_mesh: dict[int, list[Ran]] = defaultdict(list)
    for one in ran:
        by_mesh[one.action.mesh].append(one)
    ends = {mesh: [one.end for one in of_mesh] for mesh, of_mesh in by_mesh.items()}
    found = []
    for one in ran:
        others = [
            other
            for mesh, of_mesh in by_mesh.items()
            if mesh != one.action.mesh
            for other in _within(of_mesh, ends[mesh], one.begin, one.end)
        ]
        beside = _beside(others, one.begin, one.end)
        step = measured_step(one.action, one.end - one.begin, beside, is_queued=one.is_queued)
        if one.gathered or one.scattered:
            step = msgspec.structs.replace(step, gathered=one.gathered, scattered=one.scattered)
        found.append(step)
    return found


def _within(ran: Sequence[Ran], ends: Sequence[float], begin: float, end: float) -> list[Ran]:
    """List the steps of one mesh that overlap with a time."""
    found = []
    for index in range(bisect_right(ends, begin), len(ran)):
        if ran[index].begin >= end:
            break
        found.append(ran[index])
    return found


def _beside(others: Sequence[Ran], begin: float, end: float) -> list[Beside]:
    """Divide a time by how many others computed in it; parts in which none did are left out."""
    changes: dict[float, list[int]] = defaultdict(lambda: [0, 0])
    for other in others:
        kind = int(isinstance(other.action, Decode))
        changes[max(begin, other.begin)][kind] += 1
        changes[min(end, other.end)][kind] -= 1
    seconds: dict[tuple[int, int], float] = defaultdict(float)
    prefills = decodes = 0
    for t, until in pairwise([*sorted(changes), end]):
        prefills, decodes = prefills + changes[t][0], decodes + changes[t][1]
        if prefills or decodes:
            seconds[prefills, decodes] += until - t
    return [Beside(part, *counts) for counts, part in sorted(seconds.items()) if part > 0]
