"""What steps take, as the planner sees it: measured, for the lengths that come, and without what moves from step to step.

`Costs` has lines over tokens and rows that follow the latest steps, which is what a router wants. A plan is for a minute
and asks for more: rows are no measure of what a decode step reads where contexts differ or will soon be others, and
where fused steps alone run nothing tells what a chunk takes and what its rows. Fused steps over the KV tokens that they
read tell both. A pure function of what was measured at each plan; no clock.
"""

from collections.abc import Sequence

from .cost import Costs
from .line_fit import Terms
from .observations import MeshSize, Pair, StepTimes

_NEWEST = 0.3  # weight of what was measured by now, beside what was at the plans before
_LEAST_FIXED = 0.3  # of a mean decode step, which reads all weights whatever its rows


class PlannedTimes:
    """The step times of one tp, from plan to plan."""

    def __init__(self, size: MeshSize):
        """Begin with nothing; `size` is that of a mesh."""
        self._size = size
        self._means: list[float] = []

    def observe(self, costs: Costs, pairs: Sequence[Pair], handoff: float) -> StepTimes:
        """Take in what was measured until now, and return what steps take with requests of these lengths; `handoff` is
        what one of them takes."""
        (prefill, decode), (alone, fused) = costs.terms_of_tp(0), costs.fused_of_tp(0)
        is_measured = costs.is_measured(0)
        if fused is None or not pairs:
            first, token, step, row = self._smoothed(*prefill, *decode)
            return StepTimes(Terms(first, token), Terms(step, row), handoff, is_measured)
        context = sum([pair.prompt + pair.output / 2 for pair in pairs]) / len(pairs)
        rows, seconds = costs.decode_mean_of_tp(0)
        fixed = max(_LEAST_FIXED * seconds, seconds - fused.each * context * rows)
        if alone is None:
            alone = self._without_rows(fused, fixed)
        first, token, step, chunk, kv_token = self._smoothed(*alone, fixed, *fused)
        prefill = Terms(first, token)
        more = max(0.0, chunk - prefill.at(self._size.chunk))
        return StepTimes(prefill, Terms(step, kv_token * context), handoff, is_measured, more)

    def _without_rows(self, fused: Terms, least: float) -> Terms:
        """Guess what a prefill mesh takes, where all meshes ran fused steps until now: these compute as many rows as
        their program has, whatever is in them, and no step is over before the weights are read."""
        chunk = self._size.chunk
        return Terms(0.0, max(least, fused.fixed * chunk / (chunk + self._size.slots)) / chunk)

    def _smoothed(self, *now: float) -> list[float]:
        if len(self._means) != len(now):  # nothing was measured so before
            self._means = list(now)
        else:
            self._means = [old + _NEWEST * (new - old) for old, new in zip(self._means, now, strict=True)]
        return self._means
