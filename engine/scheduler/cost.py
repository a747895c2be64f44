"""What work costs, in seconds, as measured while it ran: prompt tokens, decode steps and their rows, bytes on a link.

Running means for each mesh, fed by the scheduler with what it dispatches and with the events that say when it was done;
a pure function of these, so that a replay finds the same costs. A mesh that has measured nothing yet has the means of
all meshes of its tp, a link those of all links; before the first measurement there are `Priors`, from a cost model
where there is one.

The first step of each size on a mesh does not count (its program and its caches are cold), and what takes far longer
than expected counts only so much (`line_fit.py`). A step begins when it is dispatched or, if that is later, when the
result of the one before it is there; a transfer when the last step before it on its source is done. All is O(1).

Where it is known when the steps of a mesh will be read (`foresee`), each counts from its time on: they are taken in, in
the order of their times, before anything is said that depends on them. So it makes no difference whether a step is
reported when it is read, or was foreseen.

Rough on purpose, a line over all sizes: `cost_model.py` knows each program, and only tells it what to begin with.
"""

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush, heapreplace

import msgspec

from ..config import EngineConfig
from ..protocol.actions import Chunk, Decode, Fused, Prefill, StartTransfer
from .cost_model import CostModel, pairs
from .line_fit import WINDOW, LineFit, Terms
from .notes import Measured, Notes, What
from .output_lengths import OutputLengths
from .steps_ahead import InFlight, StepsAhead, next_of

# How much of a mean grows with the size where all sizes measured were alike: all of it where prompts are computed and
# bytes moved, little of it where a step reads all weights for however many rows.
_PREFILL_SHARE, _DECODE_SHARE, _TRANSFER_SHARE = 1.0, 0.2, 0.5
_EACH_OF_TP = 8  # one in so many of a mesh's steps counts for the means of its tp, besides the first


class Priors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What work costs before any was measured. The ratios matter: where nothing runs yet, nothing is to be harmed."""

    prefill: Terms = Terms(0.0, 1e-4)  # of a step, and of each prompt token
    decode: Terms = Terms(1e-2, 1e-4)  # of a step, and of each row
    transfer: Terms = Terms(1e-3, 1e-9)  # of a transfer, and of each byte


PRIORS = Priors()
_TYPICAL_CONTEXT = 1024  # tokens of a row where only one line for all lengths is wanted


def priors_of(costs: CostModel, config: EngineConfig) -> Priors:
    """Return what a cost model says before anything was measured: lines through the smallest and the largest steps, all
    full, of prompts that begin, and of rows that are half as long as may be or `_TYPICAL_CONTEXT` tokens."""
    context = min(_TYPICAL_CONTEXT, -(-config.max_model_len // 2))
    prefill = {
        size: program.fixed + program.chunk + program.pair * pairs(0, size) for size, program in costs.prefill.items()
    }
    decode = {
        size: program.fixed + (program.row + program.context * context) * size for size, program in costs.decode.items()
    }
    transfer = Terms(costs.link.fixed, costs.link.byte)
    return Priors(
        _line(prefill, _PREFILL_SHARE) if prefill else PRIORS.prefill,
        _line(decode, _DECODE_SHARE) if decode else PRIORS.decode,
        transfer if any(transfer) else PRIORS.transfer,
    )


def _line(seconds: Mapping[int, float], share: float) -> Terms:
    """Return the line through the smallest and the largest size, with neither part negative; `share` is how much of one
    size alone grows with it."""
    small, large = min(seconds), max(seconds)
    steepest = seconds[large] / large
    if small == large:
        return Terms((1 - share) * seconds[large], share * steepest)
    each = min(max(0.0, (seconds[large] - seconds[small]) / (large - small)), steepest)
    return Terms(seconds[large] - each * large, each)


class _Step:
    """A step that is running."""

    __slots__ = ("behind", "dispatched", "rows", "size", "steps", "tokens")

    def __init__(self, dispatched: float, size: tuple[int, int], tokens: int, rows: int, steps: int):
        self.dispatched, self.size, self.tokens, self.rows, self.steps = dispatched, size, tokens, rows, steps
        self.behind: list[_Transfer] | None = None  # transfers that begin when it is done


class _Transfer:
    """A transfer under way."""

    __slots__ = ("link", "size", "start")

    def __init__(self, link: tuple[int, int], size: int, start: float | None):
        self.link, self.size, self.start = link, size, start  # start None: a step before it is not done


class _Means:
    """What was measured on all meshes of one tp, a sample of it."""

    __slots__ = ("decode", "prefill")

    def __init__(self, priors: Priors):
        self.prefill, self.decode = LineFit(_PREFILL_SHARE, priors.prefill), LineFit(_DECODE_SHARE, priors.decode)


class _Mesh:
    """One mesh: its means, those of its tp until it has measured some, and what runs there."""

    __slots__ = ("ahead", "decode", "last", "of_tp", "prefill", "result", "seen", "steps")

    def __init__(self, of_tp: _Means):
        self.ahead: StepsAhead | None = None  # the results that are foreseen
        self.of_tp, self.prefill, self.decode = of_tp, of_tp.prefill, of_tp.decode
        self.steps: dict[int, _Step] = {}  # running, by number
        self.seen: set[tuple[int, int]] = set()  # sizes of steps that have run
        self.result = 0.0  # when the last result came
        self.last = -1  # the step that was dispatched last

    def add_prefill(self, tokens: int, seconds: float) -> None:
        """Take in what prompt tokens took."""
        if self.prefill is self.of_tp.prefill:
            self.prefill = LineFit(_PREFILL_SHARE)
        _add(self.prefill, self.of_tp.prefill, tokens, seconds)

    def add_decode(self, rows: int, seconds: float) -> None:
        """Take in what a decode step took."""
        if self.decode is self.of_tp.decode:
            self.decode = LineFit(_DECODE_SHARE)
        _add(self.decode, self.of_tp.decode, rows, seconds)


def _add(own: LineFit, of_tp: LineFit, size: int, seconds: float) -> None:
    own.add(size, seconds)
    if own.count < _EACH_OF_TP or not own.count % _EACH_OF_TP:
        of_tp.add(size, seconds)


class Costs:
    """The costs of one engine; `now` is the time of the newest event, which the scheduler sets."""

    def __init__(self, config: EngineConfig, notes: Notes, priors: Priors = PRIORS):
        """Begin with nothing measured; `notes` takes what is, now and then."""
        self._notes, self.priors, self.now = notes, priors, 0.0
        self.chunk_size = config.chunk_size
        self._fused = [spec.fused for spec in config.topology.meshes]
        of_tp = {spec.tp: _Means(priors) for spec in config.topology.meshes}
        self._meshes = [_Mesh(of_tp[spec.tp]) for spec in config.topology.meshes]
        self._links: dict[tuple[int, int], LineFit] = {}
        self._all_links = LineFit(_TRANSFER_SHARE, priors.transfer)
        self._transfers: dict[int, _Transfer] = {}
        # When a foreseen result counts for the means of its tp: time, mesh, what foresees it, and the results until
        # then, itself included. The earliest first.
        self._samples: list[tuple[float, int, StepsAhead, int]] = []
        self.outputs = OutputLengths()

    # ---- what work costs

    def prefill(self, mesh: int, tokens: int) -> float:
        """Return the seconds to compute so many prompt tokens, in as many steps as they take."""
        fit = self._meshes[mesh].prefill
        return fit.fixed * -(-tokens // self.chunk_size) + fit.each * tokens

    def decode(self, mesh: int, rows: int) -> float:
        """Return the seconds of one decode step of so many rows; 0 without rows."""
        if not rows:
            return 0.0
        fit = self._caught_up(mesh).decode
        return fit.fixed + fit.each * rows

    def beside(self, mesh: int, rows: int) -> float:
        """Return the seconds that so many rows which decode on a mesh add to each prompt chunk there: a decode step
        between two chunks or, in one step with it (fused), what rows add to a step that reads the weights anyway."""
        return self.decode(mesh, rows) - (self._meshes[mesh].decode.fixed if rows and self._fused[mesh] else 0.0)

    def transfer(self, source: int, destination: int, size: int) -> float:
        """Return the seconds to move `size` bytes in one transfer."""
        return self._links.get((source, destination), self._all_links).terms().at(size)

    def prefill_terms(self, mesh: int) -> Terms:
        """Return the seconds of a prefill step: what each has, and each prompt token."""
        return self._meshes[mesh].prefill.terms()

    def terms_of_tp(self, mesh: int) -> tuple[Terms, Terms]:
        """Return the seconds of prefill and decode steps, as on all meshes of this one's tp."""
        self._count_samples()
        of = self._meshes[mesh].of_tp
        return of.prefill.terms(), of.decode.terms()

    def row_seconds(self, mesh: int) -> float:
        """Return the seconds that a row adds to a decode step, as on all meshes of this one's tp: a slope is a rough
        thing, and where it decides between meshes they should not differ by that."""
        if self._samples:
            self._count_samples()
        return self._meshes[mesh].of_tp.decode.each

    def busy(self, mesh: int) -> float:
        """Return the seconds until the steps that are dispatched should be done."""
        of = self._meshes[mesh]
        if of.ahead is not None:
            self._caught_up(mesh)
            steps = of.ahead.in_flight_now()
            end = max(of.result, steps[0].dispatched)
            for foreseen in steps:
                end += of.decode.fixed + of.decode.each * foreseen.rows
        elif not of.steps:
            return 0.0
        else:
            end = max(of.result, next(iter(of.steps.values())).dispatched)
            for step in of.steps.values():
                rows = self.beside(mesh, step.rows) if step.tokens else step.steps * self.decode(mesh, step.rows)
                end += rows + self.prefill(mesh, step.tokens)
        return max(0.0, end - self.now)

    def is_measured(self, mesh: int) -> bool:
        """Return whether prompts and decode steps were both measured, here or on another mesh of the same tp."""
        if self._samples:
            self._count_samples()
        of = self._meshes[mesh].of_tp
        return bool(of.prefill.count and of.decode.count)

    @property
    def is_link_measured(self) -> bool:
        """Return whether anything was moved between meshes yet."""
        return self._all_links.count > 0

    # ---- what is foreseen

    def can_foresee(self, mesh: int, buckets: Iterable[int]) -> bool:
        """Return whether the results of decode steps of these sizes can be foreseen: a first one of its size, and one
        that a transfer waits for, cannot."""
        of = self._meshes[mesh]
        return all((0, bucket) in of.seen for bucket in buckets) and not any(s.behind for s in of.steps.values())

    def foresee(self, mesh: int, ends: Sequence[float], rows: int, bucket: int, last: tuple[int, int] | None) -> None:
        """Take in when the decode steps of a mesh will be read: of the two in flight, and of those that follow, which
        have `rows` rows, this `bucket`, and are dispatched as soon as the one before the last is read; but the one that
        is dispatched when the last of these is read has the rows and bucket that `last` says, None: there is none.
        `settle` ends it."""
        of = self._meshes[mesh]
        in_flight = [InFlight(n, step.dispatched, step.rows, step.size[1]) for n, step in of.steps.items()]
        of.ahead = StepsAhead(ends, rows, bucket, in_flight, last)
        self._expect_sample(mesh, of, of.ahead)

    def settle(self, mesh: int, results: int, *, dispatched: bool = True) -> None:
        """Take in that so many of the steps that were foreseen are read by now, and that nothing else is foreseen.
        `dispatched` False: no step was dispatched yet on the last of them."""
        of = self._meshes[mesh]
        ahead = of.ahead
        assert ahead is not None
        ahead.end_after(results)
        self._count_samples()
        self._count(of, ahead, results)
        steps = ahead.in_flight_now()
        of.last = steps[-1].number
        of.steps = {n: _Step(begun, (0, bucket), 0, rows, 1) for n, begun, rows, bucket in steps}
        if not dispatched:
            of.steps.popitem()
        of.ahead = None

    def _caught_up(self, mesh: int) -> _Mesh:
        """Count what was read of a mesh by now, and for the means of tps of all meshes; return the mesh."""
        of = self._meshes[mesh]
        if self._samples:
            self._count_samples()
        if of.ahead is not None:
            self._count(of, of.ahead, of.ahead.read_by(self.now))
        return of

    def _count_samples(self) -> None:
        """Count what was read by now for the means of tps, in the order of time."""
        samples, now = self._samples, self.now
        while samples and samples[0][0] <= now:
            _, mesh, ahead, results = samples[0]
            of, ends = self._meshes[mesh], ahead.ends
            if of.ahead is ahead and results <= len(ends):
                if results > len(ahead.in_flight):  # for the mesh itself it is counted later, with those around it
                    of.of_tp.decode.add(ahead.rows, ends[results - 1] - ends[results - 2])
                    count = of.decode.count + results - ahead.counted
                else:
                    self._count(of, ahead, results)
                    count = of.decode.count
                following = results + next_of(count, _EACH_OF_TP)
                if following <= len(ends):
                    heapreplace(samples, (ends[following - 1], mesh, ahead, following))
                    continue
            heappop(samples)

    def _expect_sample(self, mesh: int, of: _Mesh, ahead: StepsAhead) -> None:
        count = of.decode.count if of.decode is not of.of_tp.decode else 0
        results = ahead.counted + next_of(count, _EACH_OF_TP)
        if results <= len(ahead.ends):
            heappush(self._samples, (ahead.ends[results - 1], mesh, ahead, results))

    def _count(self, of: _Mesh, ahead: StepsAhead, results: int) -> None:
        """Count the first so many of the results that were foreseen; those samples of them that were not in flight at
        first are counted already."""
        counted, ends = ahead.counted, ahead.ends
        if results <= counted:
            return
        while counted < len(ahead.in_flight) and counted < results:
            _, dispatched, rows, _ = ahead.in_flight[counted]
            start, of.result = max(of.result, dispatched), ends[counted]
            of.add_decode(rows, of.result - start)
            counted += 1
        if counted < results:
            of.decode.add_run(ahead.rows, of.result, ends[counted:results])
            of.result = ends[results - 1]
        ahead.counted = results

    # ---- what is measured

    def begin_step(self, step: Prefill | Decode | Fused) -> None:
        """Note that a step is dispatched now."""
        of = self._meshes[step.mesh]
        of.last = step.step
        if isinstance(step, Decode):
            of.steps[step.step] = _Step(self.now, (0, step.bucket), 0, len(step.rows), step.steps)
        elif isinstance(step, Prefill):
            of.steps[step.step] = _Step(self.now, (step.bucket, 0), _tokens(step.chunks), 0, 1)
        else:
            of.steps[step.step] = _Step(self.now, (step.bucket, 1), _tokens(step.chunks), len(step.rows), 1)

    def end_step(self, mesh: int, step: int, t: float) -> float:
        """Take in that the result of a step came at `t`; return the seconds that it took."""
        if self._samples:
            self._count_samples()
        of = self._meshes[mesh]
        done = of.steps.pop(step)
        start, of.result = of.result if of.result > done.dispatched else done.dispatched, t
        if done.behind is not None:
            _begin(done.behind, t)
        seconds = t - start if t > start else 0.0
        if done.size not in of.seen:
            of.seen.add(done.size)
            return seconds
        if not done.tokens:
            of.add_decode(done.rows, seconds / done.steps)
        elif not done.rows:
            of.add_prefill(done.tokens, seconds)
        else:  # its rows add what a row adds to a decode step: the chunks read the weights for them
            of.add_prefill(done.tokens, max(0.0, seconds - self.beside(mesh, done.rows)))
        if self._notes.are_kept:
            if done.tokens:
                self._note("prefill", of.prefill, mesh)
            else:
                self._note("decode", of.decode, mesh)
        return seconds

    def begin_transfer(self, action: StartTransfer, size: int) -> None:
        """Note that a transfer of `size` bytes is dispatched now; it begins when its source has done the steps
        before it."""
        of = self._meshes[action.source]
        before = of.steps.get(of.last)
        begun = _Transfer((action.source, action.destination), size, self.now if before is None else None)
        self._transfers[action.transfer] = begun
        if before is not None:
            before.behind = [begun] if before.behind is None else [*before.behind, begun]

    def end_transfer(self, number: int, t: float | None) -> None:
        """Take in that a transfer arrived at `t`; None: it failed."""
        done = self._transfers.pop(number, None)
        # Where its arrival was seen before the result of the step before it, nobody knows when it began.
        if done is None or done.start is None or t is None:
            return
        fit = self._links.get(done.link)
        if fit is None:
            fit = self._links[done.link] = LineFit(_TRANSFER_SHARE)
        size, seconds = max(1, done.size), max(0.0, t - done.start)
        fit.add(size, seconds)
        self._all_links.add(size, seconds)
        if self._notes.are_kept:
            self._note("transfer", fit, *done.link)

    def _note(self, what: What, fit: LineFit, mesh: int, destination: int | None = None) -> None:
        """Note what was measured, when it was measured for the 1st, 2nd, 4th, ... time, or for so many times again."""
        if fit.count & (fit.count - 1) == 0 or fit.count % WINDOW == 0:
            self._notes.add(Measured(what, mesh, destination, fit.count, *fit.terms()))

    def lose_mesh(self, mesh: int) -> None:
        """Forget the steps that were running on a mesh that was lost; what was measured stays."""
        self._meshes[mesh].steps.clear()

    def check(self, in_flight: Sequence[Iterable[int]]) -> None:
        """Raise unless these steps are running, by mesh."""
        for mesh, (of, steps) in enumerate(zip(self._meshes, in_flight, strict=True)):
            if of.steps.keys() != set(steps):
                raise RuntimeError(f"mesh {mesh}: steps {set(steps)} are running, {set(of.steps)} are measured")


def _tokens(chunks: Sequence[Chunk]) -> int:
    return sum([chunk.length for chunk in chunks])


def _begin(transfers: Sequence[_Transfer], t: float) -> None:
    for transfer in transfers:
        transfer.start = t
