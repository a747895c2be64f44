"""Whether a plan that was made still stands: observations that differ from those before by no more than chance moves
them from one plan to the next. No clock, no randomness; a replay finds the same."""

from collections.abc import Iterator

from .observations import Observations

_ALIKE = 0.05  # of the larger of two amounts: so far they are the same
_SECONDS = 0.25  # of every mesh's time, by which what waits may differ
_ROWS = 0.05  # of the requests that meshes hold, by which what decodes and waits for credit may differ


def are_alike(now: Observations, before: Observations) -> bool:
    """Return whether a plan of the observations before, which left the roles as they were, is one of those now."""
    if now.is_changing or before.is_changing or now.roles != before.roles:
        return False
    meshes, step = sum(now.roles), now.times.prefill.at(now.size.chunk) / now.size.chunk
    if step * abs(now.queues.to_prefill - before.queues.to_prefill) > _SECONDS * meshes:
        return False
    held = _ROWS * meshes * now.size.slots
    if abs(now.queues.decoding - before.queues.decoding) + abs(now.queues.for_credit - before.queues.for_credit) > held:
        return False
    return all(abs(new - old) <= _ALIKE * max(new, old) for new, old in zip(_amounts(now), _amounts(before), strict=True))


def _amounts(observed: Observations) -> Iterator[float]:
    """Yield what a plan depends on smoothly."""
    demand, times = observed.demand, observed.times
    yield sum(demand.requests)
    yield sum(demand.tokens)
    yield sum([pair.output for pair in demand.pairs]) / max(1, len(demand.pairs))
    yield times.prefill.at(observed.size.chunk)
    yield times.decode.at(max(1.0, observed.queues.decoding / sum(observed.roles)))
