"""What work costs, in seconds, as measured while it ran: prompt tokens, decode steps and their rows, bytes on a link.

Running means for each mesh, fed by the scheduler with what it dispatches and with the events that say when it was done;
a pure function of these, so that a replay finds the same costs. A mesh that has measured nothing yet borrows from the
one of its own tp that measured last, a link likewise from any; before the first measurement there are `Priors`.

The first step of each size on a mesh does not count (its program and its caches are cold), and what takes far longer
than expected counts only so much (`fit.py`). A step begins when it is dispatched or, if that is later, when the result
of the one before it is there; a transfer when the last step before it on its source is done. Everything is O(1).

Rough on purpose: the cost model of the planner takes the place behind `prefill`, `decode` and `transfer`.
"""

from collections.abc import Iterable, Sequence

import msgspec

from ..config import EngineConfig
from ..protocol.actions import Chunk, Decode, Fused, Prefill, StartTransfer
from .fit import Fit, Terms

# How much of a mean grows with the size where all sizes measured were alike: all of it where prompts are computed and
# bytes moved, little of it where a step reads all weights for however many rows.
_PREFILL_SHARE, _DECODE_SHARE, _TRANSFER_SHARE = 1.0, 0.2, 0.5


class Priors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What work costs before any was measured. The ratios matter: where nothing runs yet, nothing is to be harmed."""

    prefill: Terms = Terms(0.0, 1e-4)  # of a step, and of each prompt token
    decode: Terms = Terms(1e-2, 1e-4)  # of a step, and of each row
    transfer: Terms = Terms(1e-3, 1e-9)  # of a transfer, and of each byte


PRIORS = Priors()


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


class _Mesh:
    """What was measured on one mesh."""

    __slots__ = ("decode", "last", "prefill", "result", "seen", "steps", "tp")

    def __init__(self, tp: int):
        self.tp, self.prefill, self.decode = tp, Fit(_PREFILL_SHARE), Fit(_DECODE_SHARE)
        self.steps: dict[int, _Step] = {}  # running, by number
        self.seen: set[tuple[int, int]] = set()  # sizes of steps that have run
        self.result = 0.0  # when the last result came
        self.last = -1  # the step that was dispatched last


class Costs:
    """The costs of one engine; `now` is the time of the newest event, which the scheduler sets."""

    def __init__(self, config: EngineConfig, priors: Priors = PRIORS):
        """Begin with nothing measured."""
        self._config, self.priors, self.now = config, priors, 0.0
        self._meshes = [_Mesh(spec.tp) for spec in config.topology.meshes]
        self._links: dict[tuple[int, int], Fit] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._prefill_of: dict[int, Fit] = {}  # by tp, of the mesh that measured last
        self._decode_of: dict[int, Fit] = {}
        self._last_link: Fit | None = None

    # ---- what work costs

    def prefill(self, mesh: int, tokens: int) -> float:
        """Return the seconds to compute so many prompt tokens, in as many steps as they take."""
        fixed, each = self.prefill_terms(mesh)
        return fixed * -(-tokens // self._config.chunk_size) + each * tokens

    def decode(self, mesh: int, rows: int) -> float:
        """Return the seconds of one decode step of so many rows; 0 without rows."""
        fixed, each = self.decode_terms(mesh)
        return fixed + each * rows if rows else 0.0

    def transfer(self, source: int, destination: int, size: int) -> float:
        """Return the seconds to move `size` bytes in one transfer."""
        return self.transfer_terms(source, destination).at(size)

    def prefill_terms(self, mesh: int) -> Terms:
        """Return the seconds of a prefill step: what each has, and each prompt token."""
        of = self._meshes[mesh]
        fit = of.prefill if of.prefill.count else self._prefill_of.get(of.tp)
        return self.priors.prefill if fit is None else fit.terms()

    def decode_terms(self, mesh: int) -> Terms:
        """Return the seconds of a decode step: what each has, and each row."""
        of = self._meshes[mesh]
        fit = of.decode if of.decode.count else self._decode_of.get(of.tp)
        return self.priors.decode if fit is None else fit.terms()

    def transfer_terms(self, source: int, destination: int) -> Terms:
        """Return the seconds of a transfer: what each has, and each byte."""
        fit = self._links.get((source, destination), self._last_link)
        return self.priors.transfer if fit is None else fit.terms()

    def is_measured(self, mesh: int) -> bool:
        """Return whether prompts and decode steps were both measured here or on another mesh of the same tp."""
        tp = self._meshes[mesh].tp
        return tp in self._prefill_of and tp in self._decode_of

    # ---- what is measured

    def begin_step(self, step: Prefill | Decode | Fused) -> None:
        """Note that a step is dispatched now."""
        of = self._meshes[step.mesh]
        of.last = step.step
        if isinstance(step, Decode):
            begun = _Step(self.now, (0, step.bucket), 0, len(step.rows), step.steps)
        elif isinstance(step, Prefill):
            begun = _Step(self.now, (step.bucket, 0), _tokens(step.chunks), 0, 1)
        else:
            begun = _Step(self.now, (step.bucket, 1), _tokens(step.chunks), len(step.rows), 1)
        of.steps[step.step] = begun

    def end_step(self, mesh: int, step: int, t: float) -> None:
        """Take in that the result of a step came at `t`."""
        of = self._meshes[mesh]
        done = of.steps.pop(step)
        start, of.result = of.result if of.result > done.dispatched else done.dispatched, t
        if done.behind is not None:
            _begin(done.behind, t)
        if done.size not in of.seen:
            of.seen.add(done.size)
            return
        seconds = t - start if t > start else 0.0
        if not done.tokens:
            of.decode.add(done.rows, seconds / done.steps)
            self._decode_of[of.tp] = of.decode
        elif not done.rows:
            of.prefill.add(done.tokens, seconds)
            self._prefill_of[of.tp] = of.prefill
        else:
            self._end_fused(mesh, of, done, seconds)

    def _end_fused(self, mesh: int, of: _Mesh, done: _Step, seconds: float) -> None:
        """Share the seconds of a fused step out as its two parts are expected to take."""
        prefill, decode = self.prefill(mesh, done.tokens), self.decode(mesh, done.rows)
        both = prefill + decode
        share = prefill / both if both > 0 else 0.5
        of.prefill.add(done.tokens, share * seconds)
        of.decode.add(done.rows, (1 - share) * seconds)
        self._prefill_of[of.tp], self._decode_of[of.tp] = of.prefill, of.decode

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
            fit = self._links[done.link] = Fit(_TRANSFER_SHARE)
        fit.add(max(1, done.size), max(0.0, t - done.start))
        self._last_link = fit

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
