"""Why a request's first token came when it did: its time to first token, divided among what it waited for.

The parts are a partition of the time from the call to the first token, so they add up to it exactly; what it was at
each instant is found in the log. What the scheduler knew in between, such as why a prompt found no room, is not in the
log but follows from it: the log is replayed, and the scheduler is looked at after each of its decisions. While a step
of the request runs, that is its own work; while one of it waits for its turn, or none could be dispatched, it is what
ran on its mesh instead.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from os import PathLike
from typing import IO, Literal, NamedTuple

import msgspec

from ...scheduler.policy import Policy
from .logged_run import LoggedRequest, LoggedRun, LoggedStep
from .watched import Watch, Watched, watch_run

Part = Literal[
    "tokenise", "turn", "enter", "held", "prefix", "seat", "pages", "credit", "prompts", "decode", "compute", "host"
]
PARTS: dict[Part, str] = {
    "tokenise": "the prompt was made tokens",
    "turn": "its turn had not come: its caller keeps only so many at once",
    "enter": "on its way to the dispatching thread, which did other things, or the waiting room was full",
    "held": "nothing is admitted while parameters are replaced",
    "prefix": "another request computed the beginning that they share",
    "seat": "no mesh that prefills had a seat",
    "pages": "no mesh that prefills had the pages",
    "credit": "no mesh that prefills had the pages: prompts that are done wait there for a place to decode",
    "prompts": "its mesh computed chunks of other prompts",
    "decode": "its mesh ran decode steps",
    "compute": "its own chunks were computed",
    "host": "the host decided, dispatched or read",
}
# Of these another mesh could have relieved it.
_RELIEVABLE: frozenset[Part] = frozenset({"seat", "pages", "credit", "prompts", "decode"})


class Behind(msgspec.Struct, frozen=True):
    """A prompt that was computed while the request waited."""

    request_id: int
    tokens: int  # of its chunks in the steps that the request waited for
    seconds: float  # of the request's time that these steps took; those of prompts in one step overlap


class Explanation(msgspec.Struct, frozen=True):
    """Why one request's first token came when it did; seconds."""

    request_id: int
    prompt_len: int
    cached: int  # prompt tokens that the prefix cache spared
    called: float  # on the engine's clock
    ttft: float
    parts: dict[Part, float]  # add up to `ttft`; those of no time are left out
    mesh: int  # where it was prefilled, last
    chunks: int  # steps that it took
    restarts: int  # how often it started over before its first token
    behind: tuple[Behind, ...]  # those that took most first, at most 5
    prefix_of: tuple[int, ...]  # requests that computed what it shares
    idle: float  # in which it waited, and another mesh that could have prefilled it computed nothing
    idle_mesh: int | None  # the one that computed nothing for longest then
    utilisation: float  # of all meshes, in the time from call to first token
    mesh_utilisation: tuple[float, ...]  # of each
    delivered: float  # after its first token: until the dispatching thread took it in


class _Span(NamedTuple):
    start: float
    stop: float
    part: Part
    step: LoggedStep | None  # that ran on its mesh


def explain(
    run: LoggedRun, source: str | PathLike[str] | IO[str], ids: Collection[int], policy: Policy | None = None
) -> list[Explanation]:
    """Explain these requests, which have a first token, in the order given; `source` is the log that `run` was read
    from, anew.

    Raises:
        DivergedError: the log does not replay.
        ValueError: a request is not there, or has no first token.
    """
    for id_ in ids:
        if run.request(id_).first_token is None:
            raise ValueError(f"{run.name}: request {id_} has no first token, so there is nothing to explain.")
    watch = watch_run(run, source, ids, policy)
    lanes = _Lanes(run)
    return [_Explainer(run, run.requests[id_], watch, watch.requests[id_], lanes).explanation() for id_ in ids]


def worst(run: LoggedRun, count: int) -> list[int]:
    """List the ids of the requests with the longest times to first token, the worst first."""
    ended = [(id_, r.first_token - r.arrival) for id_, r in run.requests.items() if r.first_token is not None]
    return [id_ for id_, _ in sorted(ended, key=lambda pair: -pair[1])[:count]]


class _Lanes:
    """The steps of each mesh that were read, which follow each other."""

    def __init__(self, run: LoggedRun) -> None:
        self.steps: list[list[LoggedStep]] = [[] for _ in run.header.pools]
        for step in sorted(run.steps, key=_begun):
            if step.stamps is not None:
                self.steps[step.stamps.mesh].append(step)
        self._begun = [[_begun(step) for step in steps] for steps in self.steps]
        self._done = [[_done(step) for step in steps] for steps in self.steps]

    def between(self, mesh: int, start: float, stop: float) -> Sequence[LoggedStep]:
        """Return the steps of a mesh that ran between two times."""
        first, last = bisect_right(self._done[mesh], start), bisect_left(self._begun[mesh], stop)
        return self.steps[mesh][first:last]

    def at(self, mesh: int, t: float) -> LoggedStep | None:
        """Return the step that a mesh ran at `t`."""
        place = bisect_right(self._begun[mesh], t) - 1
        return self.steps[mesh][place] if place >= 0 and self._done[mesh][place] > t else None

    def busy(self, mesh: int, start: float, stop: float) -> float:
        """Return the seconds in which a mesh ran steps between two times."""
        return sum([min(stop, _done(step)) - max(start, _begun(step)) for step in self.between(mesh, start, stop)])


class _Explainer:
    """One request that is being explained."""

    def __init__(self, run: LoggedRun, request: LoggedRequest, watch: Watch, watched: Watched, lanes: _Lanes) -> None:
        assert request.first_token is not None
        self._run, self._request, self._watch, self._watched, self._lanes = run, request, watch, watched, lanes
        self._start, self._stop = request.arrival, request.first_token
        self._own = [step for step in request.steps if step.stamps is not None]

    def explanation(self) -> Explanation:
        spans = list(self._spans())
        parts = dict.fromkeys(PARTS, 0.0)
        for span in spans:
            parts[span.part] += span.stop - span.start
        gaps = {mesh: list(self._idle_of(mesh, spans)) for mesh in range(len(self._run.header.pools))}
        idle = {mesh: sum([stop - start for start, stop in found]) for mesh, found in gaps.items()}
        meshes = range(len(self._run.header.pools))
        seconds = self._stop - self._start
        used = tuple([self._lanes.busy(m, self._start, self._stop) / seconds if seconds else 0.0 for m in meshes])
        longest = max(idle, key=lambda mesh: idle[mesh], default=None)
        request, last = self._request, self._own[-1].stamps if self._own else None
        return Explanation(
            request_id=request.facts.id,
            prompt_len=request.facts.prompt_len,
            cached=request.cached,
            called=self._start,
            ttft=seconds,
            parts={part: parts[part] for part in PARTS if parts[part] > 0},
            mesh=self._mesh_at(self._stop),
            chunks=len(request.steps),
            restarts=self._watched.restarts,
            behind=self._behind(spans),
            prefix_of=tuple(self._watched.awaited),
            # Spans are cut where any mesh begins or ends a step, so those of two meshes are equal or apart.
            idle=sum([stop - start for start, stop in {gap for found in gaps.values() for gap in found}], 0.0),
            idle_mesh=longest if longest is not None and idle[longest] > 0 else None,
            utilisation=sum(used) / len(used),
            mesh_utilisation=used,
            delivered=0.0 if last is None else max(0.0, last.read - self._stop),
        )

    # ---- what each instant was

    def _spans(self) -> Iterator[_Span]:
        """Divide the time from the call to the first token."""
        cuts = sorted({self._start, self._stop, *[t for t in self._times() if self._start < t < self._stop]})
        for start, stop in pairwise(cuts):
            middle = (start + stop) / 2  # nothing changes in between
            part, step = self._part(middle)
            yield _Span(start, stop, part, step)

    def _times(self) -> Iterator[float]:
        """Yield the times at which something may have changed."""
        stamps = self._request.stamps
        if stamps is not None:
            yield from (stamps.tokenised, stamps.entered, stamps.accepted)
        for own in self._own:
            assert own.stamps is not None
            yield from (own.stamps.decided, own.stamps.dispatched, own.stamps.begun, own.stamps.done)
        yield from [t for t, _ in self._watched.states]
        for mesh in range(len(self._run.header.pools)):
            for step in self._lanes.between(mesh, self._start, self._stop):
                yield from (_begun(step), _done(step))

    def _part(self, t: float) -> tuple[Part, LoggedStep | None]:
        """Return what the request waited for at `t`, and the step that its mesh ran then."""
        stamps = self._request.stamps
        if stamps is not None:
            if t < stamps.tokenised:
                return "tokenise", None
            if t < stamps.entered:
                return "turn" if stamps.after is not None else "tokenise", None
            if t < stamps.accepted:
                return "enter", None
        for own in self._own:
            assert own.stamps is not None
            if own.stamps.begun <= t < own.stamps.done:
                return "compute", own
        mesh = self._mesh_at(t)
        running = self._lanes.at(mesh, t)
        state = self._watched.state_at(t)
        if state is not None and state != "placed":
            return state, running
        if running is None:
            return "host", None
        return ("prompts" if running.chunks else "decode"), running

    def _mesh_at(self, t: float) -> int:
        """Return the mesh that the request was on at `t` or, before that, came to."""
        for own in self._own:
            if t < _done(own):
                return own.action.mesh
        return self._own[-1].action.mesh if self._own else 0

    # ---- what it says

    def _behind(self, spans: Sequence[_Span]) -> tuple[Behind, ...]:
        """Sum up the prompts that were computed on its mesh while it waited."""
        seconds, tokens = defaultdict[int, float](float), defaultdict[int, int](int)
        counted = set[int]()
        for span in spans:
            if span.step is None or span.part == "compute":
                continue
            for chunk in span.step.chunks:
                if chunk.request_id != self._request.facts.id:
                    seconds[chunk.request_id] += span.stop - span.start
                    if span.step.action.step not in counted:
                        tokens[chunk.request_id] += chunk.length
            counted.add(span.step.action.step)
        most = sorted(seconds, key=lambda id_: (-seconds[id_], id_))[:5]
        return tuple([Behind(id_, tokens[id_], seconds[id_]) for id_ in most])

    def _idle_of(self, mesh: int, spans: Sequence[_Span]) -> Iterator[tuple[float, float]]:
        """Yield when the request waited and a mesh could have prefilled it instead, idle."""
        for span in spans:
            middle = (span.start + span.stop) / 2
            is_other = mesh != self._mesh_at(middle) or span.part in ("seat", "pages", "credit")
            could = is_other and span.part in _RELIEVABLE and self._watch.prefills_at(mesh, middle)
            if could and self._lanes.at(mesh, middle) is None:
                yield span.start, span.stop


def _begun(step: LoggedStep) -> float:
    return 0.0 if step.stamps is None else step.stamps.begun


def _done(step: LoggedStep) -> float:
    return 0.0 if step.stamps is None else step.stamps.done
