"""What a logged run's steps, transfers and host took: costs that are fitted to that very log.

A step's seconds are from when its devices could begin it until its result was there; the first of each program on each
mesh is left out, since it ran cold. A transfer counts where nothing else left its source or came to its destination
meanwhile, the first of each size on each link left out likewise. What the host takes is fitted to the requests that
waited for no turn, and to the time from each decision to each dispatch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ...protocol.stamps import TransferStamps
from ...scheduler.cost_model import CostModel
from ..costs.fit import fit_costs, fit_host, spread
from ..costs.measured import Entered, HostWork, MeasuredStep, MeasuredTransfer, without_cold
from ..costs.overlaps import Ran, measured_steps
from .logged_run import LoggedRequest, LoggedRun, LoggedStep


class Fitted(NamedTuple):
    """What a run's log says of costs."""

    costs: CostModel
    spread: float  # of step times around them, the standard deviation of their logarithm
    never_beside: str  # which steps never had their like beside them, where several meshes ran; empty: none


def fit_to(run: LoggedRun) -> Fitted:
    """Fit costs to a run, of the programs that ran more than once.

    Raises:
        ValueError: none did.
    """
    steps = steps_of(run)
    if not steps:
        raise ValueError(f"{run.name} has too few steps to fit costs to: each program has to run twice.")
    try:
        costs = fit_costs(steps, transfers_of(run), fit_host(_entered(run), _host_work(run), _lags(run)))
    except ValueError as error:
        raise ValueError(f"{run.name} is too short: {error}") from None
    return Fitted(costs, spread(costs, steps), _never_beside(steps) if len(run.header.pools) > 1 else "")


def _never_beside(steps: Sequence[MeasuredStep]) -> str:
    missing = []
    if not any(part.prefills for step in steps if step.kind != "decode" for part in step.beside):
        missing.append("prompts never ran beside prompts")
    if not any(part.decodes for step in steps if step.kind == "decode" for part in step.beside):
        missing.append("decode steps never beside decode steps")
    return " and ".join(missing)


def steps_of(run: LoggedRun) -> list[MeasuredStep]:
    """List the steps that were read, cold ones left out."""
    ran = [
        Ran(
            step.action,
            step.stamps.begun,
            step.stamps.done,
            step.stamps.begun > step.stamps.dispatched,
            step.gathered,
            step.scattered,
        )
        for step in run.steps
        if step.stamps is not None
    ]
    return without_cold(measured_steps(sorted(ran, key=lambda one: one.begin)))


def transfers_of(run: LoggedRun) -> list[MeasuredTransfer]:
    """List the transfers that had their link for themselves, cold ones left out."""
    found, seen = [], set[tuple[int, int, int]]()
    free: dict[tuple[str, int], float] = {}  # until when something leaves a mesh, or comes to it
    ordered = sorted(run.transfers, key=lambda transfer: transfer.begun)
    for place, transfer in enumerate(ordered):
        ends = ("from", transfer.source), ("to", transfer.destination)
        after = ordered[place + 1] if place + 1 < len(ordered) else None
        is_alone = all(free.get(end, 0.0) <= transfer.begun for end in ends)
        is_left_alone = after is None or after.begun >= transfer.arrived or not _share(transfer, after)
        free |= {end: max(transfer.arrived, free.get(end, 0.0)) for end in ends}
        key = transfer.source, transfer.destination, transfer.size
        if is_alone and is_left_alone and key in seen:
            found.append(MeasuredTransfer(transfer.size, transfer.arrived - transfer.begun))
        seen.add(key)
    return found


def _share(first: TransferStamps, second: TransferStamps) -> bool:
    return first.source == second.source or first.destination == second.destination


def _entered(run: LoggedRun) -> list[Entered]:
    """List what it took each request to come in, after those before it. Prompts of one call come in together: each has
    its share of the time until the last of them was in."""
    calls: defaultdict[float, list[LoggedRequest]] = defaultdict(list)
    for request in run.requests.values():
        if request.stamps is not None and request.stamps.after is None:
            calls[request.arrival].append(request)
    found, before = [], 0.0
    ends = {at: max(map(_accepted, requests)) for at, requests in calls.items()}
    for at, end in sorted(ends.items(), key=lambda item: item[1]):
        requests = calls[at]
        seconds = (end - max(at, before)) / len(requests)
        tokens = sum([request.facts.prompt_len for request in requests]) / len(requests)
        before = end
        if seconds > 0:
            found += [Entered(tokens, seconds)] * len(requests)
    return found


def _accepted(request: LoggedRequest) -> float:
    return 0.0 if request.stamps is None else request.stamps.accepted


def _lags(run: LoggedRun) -> list[float]:
    return [step.stamps.read - step.stamps.done for step in run.steps if step.stamps is not None]


def _host_work(run: LoggedRun) -> list[HostWork]:
    """List what the host did for each step: from its decision, or the dispatch of the one before it, to its own."""
    found, before = [], 0.0
    for step in sorted(run.steps, key=_dispatched):
        if step.stamps is not None:
            seconds = step.stamps.dispatched - max(before, step.stamps.decided)
            before = step.stamps.dispatched
            if seconds > 0:
                found.append(HostWork(seconds, 1, len(step.chunks) + len(step.rows), 0))
    return found


def _dispatched(step: LoggedStep) -> float:
    return 0.0 if step.stamps is None else step.stamps.dispatched
