"""TPOT targets: what each running answer may be slowed down to, and the tightest of all on a mesh."""

from collections import Counter
from math import inf

from ..protocol.service import SLO


def tpot_target(slo: SLO | None) -> float:
    """Return the seconds for each token that an answer is to keep to: 0 without an SLO, it must not be slowed down for
    others; infinite where the SLO leaves it open."""
    if slo is None:
        return 0.0
    return inf if slo.tpot_ms is None else slo.tpot_ms / 1000


class Targets:
    """The targets of the requests on one mesh."""

    def __init__(self) -> None:
        self._counts = Counter[float]()

    def add(self, target: float) -> None:
        """Take in a request's target."""
        self._counts[target] += 1

    def remove(self, target: float) -> None:
        """Take out a request's target."""
        self._counts[target] -= 1
        if not self._counts[target]:
            del self._counts[target]

    @property
    def tightest(self) -> float:
        """Return the least target; infinite where nobody has any."""
        return min(self._counts, default=inf)

    def besides(self, target: float) -> float:
        """Return the tightest target of all but one request that has this one."""
        return min((key for key, count in self._counts.items() if key != target or count > 1), default=inf)

    def check(self, targets: Counter[float]) -> None:
        """Raise unless these are the targets."""
        if self._counts != targets:
            raise RuntimeError(f"targets of {targets} are kept as {self._counts}")
