"""What work costs on one mesh, as running means of what was measured there, and what runs there. Facts only.

Until a mesh has measured something it has the means of all meshes of its tp, which take in a sample of what each
measures. `cost.py` says what counts and when; ranking reads the means here.
"""

from itertools import chain, repeat
from operator import sub

from .line_fit import LineFit, Terms
from .steps_ahead import StepsAhead

# How much of a mean grows with the size where all sizes measured were alike: all of it where prompts are computed and
# bytes moved, little of it where a step reads all weights for however many rows.
PREFILL_SHARE, DECODE_SHARE, TRANSFER_SHARE = 1.0, 0.2, 0.5
EACH_OF_TP = 8  # one in so many of a mesh's steps counts for the means of its tp, besides the first


class RunningTransfer:
    """A transfer under way."""

    __slots__ = ("link", "size", "start")

    def __init__(self, link: tuple[int, int], size: int, start: float | None):
        self.link, self.size, self.start = link, size, start  # start None: a step before it is not done


class RunningStep:
    """A step that is running."""

    __slots__ = ("behind", "dispatched", "rows", "size", "steps", "tokens")

    def __init__(self, dispatched: float, size: tuple[int, int], tokens: int, rows: int, steps: int):
        self.dispatched, self.size, self.tokens, self.rows, self.steps = dispatched, size, tokens, rows, steps
        self.behind: list[RunningTransfer] | None = None  # transfers that begin when it is done


class TpCosts:
    """What was measured on all meshes of one tp, a sample of it."""

    __slots__ = ("decode", "prefill")

    def __init__(self, prefill: Terms, decode: Terms):
        """Begin with what is believed of steps before any was measured."""
        self.prefill, self.decode = LineFit(PREFILL_SHARE, prefill), LineFit(DECODE_SHARE, decode)


class MeshCosts:
    """One mesh. `prefill` and `decode` are its lines: seconds of a step by its prompt tokens, and by its rows."""

    __slots__ = (
        "_chunk_size", "_is_fused", "ahead", "decode", "last", "of_tp", "prefill", "result", "seen", "steps",
    )  # fmt: skip

    def __init__(self, of_tp: TpCosts, chunk_size: int, is_fused: bool):
        """Begin with what is known of its tp."""
        self._chunk_size, self._is_fused = chunk_size, is_fused
        self.of_tp, self.prefill, self.decode = of_tp, of_tp.prefill, of_tp.decode
        self.ahead: StepsAhead | None = None  # the results that are foreseen
        self.steps: dict[int, RunningStep] = {}  # by number
        self.seen: set[tuple[int, int]] = set()  # sizes of steps that have run
        self.result = 0.0  # when the last result came
        self.last = -1  # the step that was dispatched last

    def prefill_seconds(self, tokens: int) -> float:
        """Return the seconds to compute so many prompt tokens, in as many steps as they take."""
        return self.prefill.fixed * -(-tokens // self._chunk_size) + self.prefill.each * tokens

    def decode_seconds(self, rows: int) -> float:
        """Return the seconds of one decode step of so many rows; 0 without rows."""
        return self.decode.at(rows) if rows else 0.0

    def beside(self, rows: int) -> float:
        """Return the seconds that so many rows add to each prompt chunk: a decode step between two chunks or, in one
        step with it (fused), what rows add to a step that reads the weights anyway."""
        return self.decode_seconds(rows) - (self.decode.fixed if rows and self._is_fused else 0.0)

    def busy(self, now: float) -> float:
        """Return the seconds until the steps that are dispatched should be done."""
        if self.ahead is not None:
            dispatched, first, second = self.ahead.running()
            end = dispatched if dispatched > self.result else self.result
            end += self.decode.at(first)
            end += self.decode.at(second) if second else 0.0
        elif self.steps:
            end = max(self.result, next(iter(self.steps.values())).dispatched)
            for step in self.steps.values():
                rows_seconds = self.beside(step.rows) if step.tokens else step.steps * self.decode_seconds(step.rows)
                end += rows_seconds + self.prefill_seconds(step.tokens)
        else:
            return 0.0
        return end - now if end > now else 0.0

    def add_prefill(self, tokens: int, seconds: float) -> None:
        """Take in what prompt tokens took."""
        if self.prefill is self.of_tp.prefill:
            self.prefill = LineFit(PREFILL_SHARE)
        _add(self.prefill, self.of_tp.prefill, tokens, seconds)

    def add_decode(self, rows: int, seconds: float) -> None:
        """Take in what a decode step took."""
        if self.decode is self.of_tp.decode:
            self.decode = LineFit(DECODE_SHARE)
        _add(self.decode, self.of_tp.decode, rows, seconds)

    def count(self, ahead: StepsAhead, results: int) -> None:
        """Count the first so many of the results that were foreseen, those that were in flight at first for the tp too:
        of the others `cost.py` does that."""
        counted, ends = ahead.counted, ahead.ends
        if results <= counted:
            return
        while counted < len(ahead.in_flight) and counted < results:
            _, dispatched, rows, _ = ahead.in_flight[counted]
            start, self.result = max(self.result, dispatched), ends[counted]
            self.add_decode(rows, self.result - start)
            counted += 1
        if counted < results:
            read = ends[counted:results]
            self.decode.add_all(zip(repeat(ahead.rows), map(sub, read, chain((self.result,), read)), strict=False))
            self.result = read[-1]
        ahead.counted = results


def _add(own: LineFit, of_tp: LineFit, size: int, seconds: float) -> None:
    own.add(size, seconds)
    if own.count < EACH_OF_TP or not own.count % EACH_OF_TP:
        of_tp.add(size, seconds)
