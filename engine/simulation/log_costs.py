"""What a logged run's steps, transfers and host took: costs that are fitted to that very log.

A step's seconds are from when its devices could begin it until its result was there; the first of each program on each
mesh is left out, since it ran cold. Beside it ran what other meshes had begun and not done. A transfer counts where its
source's earlier ones had arrived, so that it had its link for itself. What no step of the log measured is in `missing`,
with what stands in for it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..protocol.actions import Decode
from ..protocol.stamps import StepStamps
from ..scheduler.cost_model import HostCost
from .logged_run import LoggedRun, LoggedStep
from .measured import Beside, MeasuredStep, MeasuredTransfer, measured_step, without_cold


def measured_steps(run: LoggedRun) -> list[MeasuredStep]:
    """List the steps of a run that were read, in the order in which they were dispatched, cold ones left out."""
    of_mesh = _by_mesh(run)
    found = []
    for step in run.steps:
        stamps = step.stamps
        if stamps is not None:
            beside = _beside(stamps, [steps for mesh, steps in enumerate(of_mesh) if mesh != stamps.mesh])
            found.append(measured_step(step.action, stamps.done - stamps.begun, beside))
    return without_cold(found)


def measured_transfers(run: LoggedRun) -> list[MeasuredTransfer]:
    """List the transfers of a run that had their link for themselves, the first of each link and size left out."""
    found, seen, free = [], set[tuple[int, int, int]](), dict[int, float]()
    for transfer in sorted(run.transfers, key=lambda transfer: transfer.begun):
        key = transfer.source, transfer.destination, transfer.size
        ends = (transfer.source, -1 - transfer.destination)  # what leaves a mesh, and what comes to one
        is_alone = all(free.get(end, 0.0) <= transfer.begun for end in ends)
        free |= {end: max(transfer.arrived, free.get(end, 0.0)) for end in ends}
        if is_alone and key in seen:
            found.append(MeasuredTransfer(transfer.size, transfer.arrived - transfer.begun))
        seen.add(key)
    return found


def host_cost(run: LoggedRun) -> HostCost:
    """Return what the host took, by medians: of requests that did not wait for a turn, and of each step.

    The time from deciding to dispatching a step is divided among the steps that were decided together.
    """
    calls = [
        (request.facts.prompt_len, request.stamps.accepted - request.arrival)
        for request in run.requests.values()
        if request.stamps is not None and request.stamps.after is None
    ]
    dispatches = _dispatch_seconds([step for step in run.steps if step.stamps is not None])
    fixed, each = _line(calls)
    step, row = _line(dispatches)
    reads = [step.stamps.read - step.stamps.done for step in run.steps if step.stamps is not None]
    # Later reads waited for the dispatching thread, which is simulated.
    return HostCost(fixed, each, step, row, float(np.percentile(reads, 10)) if reads else 0.0)


def _dispatch_seconds(steps: Sequence[LoggedStep]) -> list[tuple[int, float]]:
    """Return rows and seconds of each step: from its decision, or the dispatch of the step before it, to its own."""
    found, before = [], 0.0
    for step in sorted(steps, key=lambda step: step.stamps.dispatched if step.stamps else 0.0):
        if step.stamps is not None:
            begun = max(before, step.stamps.decided)
            found.append((len(step.chunks) + len(step.rows), step.stamps.dispatched - begun))
            before = step.stamps.dispatched
    return found


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit fixed + each x size, both 0 or more, to medians of equal parts of the points by size."""
    if not points:
        return 0.0, 0.0
    sizes, seconds = (np.array(column, float) for column in zip(*sorted(points), strict=True))
    if sizes[0] == sizes[-1] or len(points) < 8:
        return max(0.0, float(np.median(seconds))), 0.0
    low, high = slice(0, len(points) // 2), slice(len(points) // 2, None)
    (x0, y0), (x1, y1) = ((float(np.median(sizes[part])), float(np.median(seconds[part]))) for part in (low, high))
    each = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
    return max(0.0, float(np.median(seconds - each * sizes))), each


# ---- what runs beside a step


@dataclass
class _Lane:
    """The steps of one mesh that were read, by when they were begun: they follow each other."""

    begun: list[float]
    done: list[float]
    decodes: list[bool]


def _by_mesh(run: LoggedRun) -> list[_Lane]:
    lanes = [_Lane([], [], []) for _ in run.header.pools]
    read = [(step.stamps, isinstance(step.action, Decode)) for step in run.steps if step.stamps is not None]
    for stamps, decodes in sorted(read, key=lambda pair: pair[0].begun):
        lane = lanes[stamps.mesh]
        lane.begun.append(stamps.begun)
        lane.done.append(stamps.done)
        lane.decodes.append(decodes)
    return lanes


def _beside(stamps: StepStamps, lanes: Sequence[_Lane]) -> list[Beside]:
    """Divide a step's time by what other meshes computed meanwhile."""
    changes: list[tuple[float, int, int]] = []
    for lane in lanes:
        first, last = bisect_right(lane.done, stamps.begun), bisect_left(lane.begun, stamps.done)
        for place in range(first, last):
            prefills, decodes = int(not lane.decodes[place]), int(lane.decodes[place])
            changes.append((max(stamps.begun, lane.begun[place]), prefills, decodes))
            changes.append((min(stamps.done, lane.done[place]), -prefills, -decodes))
    found, before, prefills, decodes = [], stamps.begun, 0, 0
    for t, more_prefills, more_decodes in sorted(changes):
        if t > before and (prefills or decodes):
            found.append(Beside(t - before, prefills, decodes))
        before = max(before, t)
        prefills, decodes = prefills + more_prefills, decodes + more_decodes
    return found
