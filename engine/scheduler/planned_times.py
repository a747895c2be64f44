"""What steps take, as the planner sees it: what is measured follows the latest steps, which is what a router wants; a
plan is for a minute, so what is measured at each plan is averaged with what was before. No clock."""

from .line_fit import Terms

_NEWEST = 0.3  # weight of what was measured by now, beside what was at the plans before


class PlannedTimes:
    """The prefill and decode steps of one tp, from plan to plan."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._means: tuple[Terms, Terms] | None = None

    def observe(self, now: tuple[Terms, Terms]) -> tuple[Terms, Terms]:
        """Take in what was measured by now, and return what to plan by."""
        before = self._means
        prefill, decode = now if before is None else (_between(*terms) for terms in zip(before, now, strict=True))
        self._means = prefill, decode
        return self._means


def _between(old: Terms, new: Terms) -> Terms:
    return Terms(*(one + _NEWEST * (other - one) for one, other in zip(old, new, strict=True)))
