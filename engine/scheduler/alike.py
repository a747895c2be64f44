"""Whether a plan that was made still stands: what is seen now differs from what it was made of by no more than chance
moves from one plan to the next, or is easier where the plan could not be better. No clock; a replay finds the same."""

from collections.abc import Iterator

from .observations import Observations

_ALIKE = 0.1  # of the larger of two amounts: so far they are the same
_SECONDS = 0.5  # of every mesh's time, by which what waits may differ
_ROWS = 0.05  # of the requests that meshes hold, by which what decodes and waits for credit may differ


def are_alike(now: Observations, before: Observations, *, or_easier: bool) -> bool:
    """Return whether a plan of the observations before, which left the roles as they were, is one of those now.
    `or_easier`: also where less comes, waits and runs, and steps take less."""
    if now.is_changing or before.is_changing or now.roles != before.roles:
        return False
    meshes, token = sum(now.roles), now.times.prefill.at(now.size.chunk) / now.size.chunk
    held = _ROWS * meshes * now.size.slots
    queues, then = now.queues, before.queues
    differences = (
        (token * (queues.to_prefill - then.to_prefill), _SECONDS * meshes),
        (queues.decoding + queues.for_credit - then.decoding - then.for_credit, held),
        (float(queues.for_credit - then.for_credit), held),
        *((new - old, _ALIKE * max(new, old)) for new, old in zip(_amounts(now), _amounts(before), strict=True)),
    )
    return all((off if or_easier else abs(off)) <= most for off, most in differences)


def _amounts(observed: Observations) -> Iterator[float]:
    """Yield what a plan depends on smoothly; more of it is harder."""
    demand, times = observed.demand, observed.times
    yield sum(demand.requests)
    yield sum(demand.tokens)
    yield sum([pair.output for pair in demand.pairs]) / max(1, len(demand.pairs))
    yield times.prefill.at(observed.size.chunk)
    yield times.decode.at(max(1.0, observed.queues.decoding / sum(observed.roles)))
