"""Decode steps of a mesh that go on by themselves, taken in many at once.

A mesh that only decodes is foreseen (`scheduler/steady.py`) up to the first result that ends a row: only that is an
event, and on the way there that rows take pages, which they do when they need them. Before it the mesh is caught up
with when something else happens to it: a request comes to decode there, a prompt is placed there, or something happens
that may concern any request. Between its own steps nobody sees the difference: slots, pages and loads are as they would
be, and costs are counted as each step is read.

Invariant: records and decisions are those of a run in which every step is an event, to the last bit, but for two things
that happen at the very same instant and have nothing to do with each other, whose order is not fixed by their times.

Not foreseen: meshes whose steps slow each other down, and all where the host takes time for steps, since its thread
serves all meshes one after the other. What callers take before a request arrives, and an idle mesh for its first step,
is no part of it.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from ..config import bucket_for
from ..core.loop import Loop, Message
from ..protocol.actions import Decode, DecodeRow
from ..protocol.events import TransferReady
from ..protocol.results import StepResult
from ..scheduler.mesh_state import MAX_STEPS_IN_FLIGHT
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from ..scheduler.steady import Steady, advance, grow
from .simulated_request import SimulatedRequest
from .virtual_executor import VirtualExecutor
from .virtual_time import VirtualTime


class _Step:
    """A decode step that is in flight."""

    __slots__ = ("action", "bucket", "rows", "tokens")

    def __init__(self, rows: list[Request], tokens: int, bucket: int, action: Decode | None = None) -> None:
        self.rows, self.tokens, self.bucket = rows, tokens, bucket  # tokens: those in the cache of its rows
        self.action = action  # None: it was never dispatched by itself


class _Fold:
    """What is foreseen of one mesh; steps count from 0, which is the one that ran when it began."""

    __slots__ = ("begun", "ends", "first", "is_over", "last", "noise", "numbers", "second", "steady")

    def __init__(self, steady: Steady, first: _Step, second: _Step, begun: float, numbers: tuple[int, int]) -> None:
        self.steady, self.first, self.second, self.begun, self.numbers = steady, first, second, begun, numbers
        self.ends: array[float]
        self.noise: list[float]
        self.last = steady.last_rows()  # of the last step that is dispatched
        self.is_over = False

    @property
    def next(self) -> int:
        """Return how many results are taken in before something happens: pages are needed, or a row ends."""
        return min(self.steady.growth, self.steady.results)

    def step(self, number: int, bucket: int) -> _Step:
        """Return one of the steps; `bucket` is that of those to come."""
        if number < 2:
            return self.second if number else self.first
        rows, steady = self.steady.rows, self.steady
        return _Step(rows, steady.tokens + (number - 2) * len(rows), bucket)


class Folding:
    """What is foreseen of all meshes of one simulation."""

    def __init__(self, loop: Loop, scheduler: Scheduler, executor: VirtualExecutor, time: VirtualTime) -> None:
        """Foresee nothing yet."""
        self._loop, self._scheduler, self._executor, self._time = loop, scheduler, executor, time
        self._meshes, buckets = executor.meshes, scheduler.config.decode_buckets
        self._buckets = [bucket_for(rows, buckets) for rows in range(buckets[-1] + 1)]
        self._folds: dict[int, _Fold] = {}
        self.folds = self.steps = 0  # how often steps were taken in many at once, and how many
        self._is_possible = executor.steps_cost_no_host and executor.meshes.can_foresee

    # ---- turns of the dispatching thread

    def before(self, messages: Sequence[Message]) -> None:
        """Catch up with all meshes before messages that may concern any request."""
        if not self._folds:
            return
        due = self._scheduler.next_due()
        if (
            (due is not None and due <= self._time.now)
            or self._scheduler.has_several_levels
            or not all(isinstance(message, tuple | StepResult | TransferReady) for message in messages)
        ):
            self.end_all()

    def after(self) -> bool:
        """Look at the meshes that were given something; return whether the scheduler has to decide once more."""
        touched, again = self._executor.touched, False
        if not touched:
            return False
        self._executor.touched = set()
        if not self._is_possible:
            return False
        for mesh in sorted(touched):
            fold = self._folds.get(mesh)
            again |= self._begin(mesh) if fold is None else self._disturb(mesh, fold)
        return again

    def end_all(self) -> None:
        """Catch up with all meshes, and foresee none."""
        for mesh, fold in list(self._folds.items()):
            self._end(mesh, fold, bisect_right(fold.ends, self._time.now, hi=fold.next))

    # ---- one mesh

    def _begin(self, mesh: int) -> bool:
        """Foresee a mesh, if it can be."""
        found = self._meshes.two_decodes(mesh)
        if found is None:
            return False
        running, queued, begun, end = found
        first, second = self._step(running), self._step(queued)
        if first is not None and second is not None:
            steady = self._scheduler.find_steady(mesh, first.rows, second.rows)
            if steady is not None:
                fold = _Fold(steady, first, second, begun, (running.step, queued.step))
                if self._can_begin(fold):
                    self._meshes.take_out(mesh)
                    self._foresee(mesh, fold, end)
        return False

    def _step(self, action: Decode) -> _Step | None:
        """Describe a step that was dispatched; None: not all of its rows go on."""
        rows = [self._scheduler.owner(row) for row in action.rows]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return None
        return _Step(found, sum([row.kv_len for row in action.rows]), action.bucket, action)

    def _can_begin(self, fold: _Fold) -> bool:
        buckets = {fold.first.bucket, fold.second.bucket, self._bucket(fold.steady.rows)}
        if fold.last:
            buckets.add(self._bucket(fold.last))
        return self._scheduler.costs.can_foresee(fold.steady.mesh.index, buckets)

    def _bucket(self, rows: Sequence[Request]) -> int:
        return self._buckets[len(rows)]

    def _foresee(self, mesh: int, fold: _Fold, end: float) -> None:
        """Foresee a mesh, whose running step ends at `end`, and plan what comes after it."""
        steady, rows, second = fold.steady, len(fold.steady.rows), fold.second
        results, bucket = steady.results, self._bucket(steady.rows)
        fold.ends, fold.noise = self._meshes.ends(
            mesh,
            end,
            (second.bucket, len(second.rows), second.tokens),
            (bucket, rows, steady.tokens),
            results + 1,
        )
        last = (len(fold.last), self._bucket(fold.last)) if fold.last else None
        self._scheduler.costs.foresee(mesh, fold.ends[:results], rows, bucket, last)
        self._folds[mesh] = fold
        self._time.at(fold.ends[fold.next], self._reach, fold)

    def _reach(self, fold: _Fold) -> None:
        """Have the rows grow that need a page, or go on with events where it is foreseen no further."""
        if fold.is_over:
            return
        steady, results = fold.steady, fold.next
        self._scheduler.pass_time(self._time.now)
        if results < steady.results and grow(steady):
            self._time.at(fold.ends[fold.next], self._reach, fold)
        else:
            self._end(steady.mesh.index, fold, results)

    def _disturb(self, mesh: int, fold: _Fold) -> bool:
        """Catch up with a mesh that was given something; return whether the scheduler has to decide once more."""
        state, now = fold.steady.mesh, self._time.now
        is_prefilling = state.prefill_load > 0
        if not is_prefilling and len(state.ready()) == len(fold.steady.rows):
            return False  # a place was taken there, no more
        results = bisect_right(fold.ends, now, hi=fold.next)
        is_dispatching = bool(results) and fold.ends[results - 1] == now  # a step which holds what has come
        are_fewer = results == fold.steady.results and len(fold.last) < len(fold.steady.rows)
        if is_prefilling or is_dispatching or are_fewer:
            self._end(mesh, fold, results, dispatched=not is_dispatching)
        else:
            self._go_on(mesh, fold, results)
        if len(state.in_flight) == MAX_STEPS_IN_FLIGHT:
            return False
        state.wake()
        return True

    def _go_on(self, mesh: int, fold: _Fold, results: int) -> None:
        """Take in so many results, and foresee the mesh anew from there."""
        self._take(mesh, fold, results)
        bucket = self._bucket(fold.steady.rows)
        first, second = fold.step(results, bucket), fold.step(results + 1, bucket)
        numbers = fold.numbers if results % 2 == 0 else fold.numbers[::-1]
        begun, end = fold.ends[results - 1] if results else fold.begun, fold.ends[results]
        steady = self._scheduler.find_steady(mesh, first.rows, second.rows)
        if steady is not None:
            anew = _Fold(steady, first, second, begun, numbers)
            if self._can_begin(anew):
                self._foresee(mesh, anew, end)
                return
        self._put_back(mesh, fold, results, second.rows)

    def _end(self, mesh: int, fold: _Fold, results: int, *, dispatched: bool = True) -> None:
        """Take in so many results, and have every step be an event again."""
        self._take(mesh, fold, results, dispatched=dispatched)
        rows = fold.last if results and results == fold.steady.results else fold.step(results + 1, 0).rows
        self._put_back(mesh, fold, results, rows if dispatched else [])

    def _take(self, mesh: int, fold: _Fold, results: int, *, dispatched: bool = True) -> None:
        fold.is_over = True
        del self._folds[mesh]
        if results:
            self.folds += 1
            self.steps += results
        self._scheduler.pass_time(self._time.now)
        self._scheduler.costs.settle(mesh, results, dispatched=dispatched)
        state, ends = fold.steady.mesh, fold.ends
        advance(fold.steady, ends, results, results if dispatched else results - 1)
        if not dispatched:
            state.in_flight.remove(fold.numbers[(results + 1) % 2])
        for before, rows in enumerate(fold.steady.since):
            if before < results:
                for request in rows:
                    running = self._loop.requests[request.id]
                    assert isinstance(running, SimulatedRequest)
                    request.hashes.extend(running.take_tokens(results - before))
        is_last = results == fold.steady.results
        self._loop.host.steps += results - (results > 0 and (not dispatched or (is_last and not fold.last)))
        self._meshes.count_busy(mesh, fold.begun, ends[:results], fold.noise[results:])

    def _put_back(self, mesh: int, fold: _Fold, results: int, queued: list[Request]) -> None:
        """Have the mesh see to its two steps itself again, the second of which has these rows, if any."""
        running = self._action(mesh, fold, results, fold.step(results, self._bucket(fold.steady.rows)).rows, queued)
        second = self._action(mesh, fold, results + 1, queued, []) if queued else None
        begun = fold.ends[results - 1] if results else fold.begun
        if not queued and len(fold.steady.mesh.in_flight) > 1:
            fold.steady.mesh.in_flight.discard(fold.numbers[(results + 1) % 2])
        self._meshes.put_back(mesh, running, begun, fold.ends[results], second)

    def _action(self, mesh: int, fold: _Fold, number: int, rows: list[Request], behind: list[Request]) -> Decode:
        """Make the action of a step, of which those in `behind` have one more behind it."""
        if number < 2:
            step = fold.second if number else fold.first
            if step.action is not None:
                return step.action
        later = set(behind)
        found = []
        for request in rows:
            placement = request.placement
            assert placement is not None
            kv_len = request.kv_len - (request in later)
            found.append(DecodeRow(request.id, request.run, placement.slot, kv_len, False))
        bucket = self._bucket(rows)
        return Decode(mesh, fold.numbers[number % 2], bucket, 1, tuple(found))
