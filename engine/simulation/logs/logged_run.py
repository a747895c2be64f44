"""What happened in a run, from its decision log: requests, steps and transfers with the times of their stamps.

It reads lines and runs no scheduler; what a scheduler thought in between is for a replay to find out. A request's times
are those of its timeline in the run: a token is stamped with the latest time that the scheduler had heard of when it
took the token in. A log that no engine wrote has no stamps, and is refused.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import IO

from ...metrics.request_records import RequestRecord, divide_ttft
from ...protocol.actions import (
    Action,
    Chunk,
    Decode,
    DecodeRow,
    Finish,
    FinishReason,
    Fused,
    Prefill,
    Scatter,
    StartTransfer,
)
from ...protocol.events import AbortRequested, Arrived, Event, RequestFacts, SetRoles, StepDone
from ...protocol.stamps import RequestStamps, StepStamps, TransferStamps
from ...scheduler.decision_log import Header, RunFacts, entries, opened, read_header
from ...scheduler.notes import Note

type Step = Prefill | Decode | Fused


@dataclass(slots=True, eq=False)
class LoggedStep:
    """A step that was dispatched."""

    action: Step
    stamps: StepStamps | None = None  # None: it was never read
    gathered: int = 0  # bytes of transfers that its mesh was to gather since the step before it
    scattered: int = 0  # and to scatter

    @property
    def chunks(self) -> Sequence[Chunk]:
        """Return its prompt chunks."""
        return () if isinstance(self.action, Decode) else self.action.chunks

    @property
    def rows(self) -> Sequence[DecodeRow]:
        """Return its rows that decode."""
        return () if isinstance(self.action, Prefill) else self.action.rows


@dataclass(slots=True, eq=False)
class LoggedRequest:
    """A request that arrived."""

    facts: RequestFacts
    arrival: float
    stamps: RequestStamps | None = None  # None: the log ends before
    steps: list[LoggedStep] = field(default_factory=list)  # with a chunk of it, up to its first token
    cached: int = 0  # prompt tokens that the prefix cache spared its first run
    prefill_start: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    hashes: list[bytes] = field(default_factory=list)  # of its full pages, the answer's too, as far as they are known
    finish: float | None = None
    reason: FinishReason | None = None  # None: it was running when the log ended

    @property
    def called(self) -> float:
        """Return when its time begins: when it was called for or, if it waited for another's end, when its turn had
        come."""
        waited = self.stamps is not None and self.stamps.after is not None
        return self.stamps.entered if waited and self.stamps is not None else self.arrival

    def record(self, number: int) -> RequestRecord:
        """Return what became of it, as request `number` of a workload."""
        called = self.called
        taken_in = self.stamps.accepted if self.stamps else called
        parts = divide_ttft(called, taken_in, self.prefill_start, self.first_token)
        assert self.reason is not None
        return RequestRecord(
            number, called, self.facts.prompt_len, self.tokens, self.cached, self.first_token, self.last_token,
            self.finish, parts.queue, parts.prefill, 0.0, parts.host, self.reason, self.facts.service.slo,
        )  # fmt: skip


@dataclass(eq=False)
class LoggedRun:
    """A whole log."""

    name: str
    header: Header
    run: RunFacts
    requests: dict[int, LoggedRequest] = field(default_factory=dict)  # by id, in the order of arrival
    steps: list[LoggedStep] = field(default_factory=list)  # in the order in which they were dispatched
    transfers: list[TransferStamps] = field(default_factory=list)  # in the order in which they arrived
    aborts: list[AbortRequested] = field(default_factory=list)
    roles: list[SetRoles] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)  # how many events of other kinds there were

    @property
    def start(self) -> float:
        """Return when the first request was called for."""
        return min([request.called for request in self.requests.values()])

    def request(self, request_id: int) -> LoggedRequest:
        """Return a request.

        Raises:
            ValueError: there is none of this id.
        """
        if request_id not in self.requests:
            last = max(self.requests)
            raise ValueError(
                f"{self.name} has no request {request_id}: it has {len(self.requests)}, from {min(self.requests)} to "
                f"{last}."
            )
        return self.requests[request_id]


def read_run(source: str | PathLike[str] | IO[str]) -> LoggedRun:
    """Read a log to its end; a torn last line is ignored.

    Raises:
        ValueError: this is no decision log, or of another version, or damaged before its last line; or it has no
            stamps, or no request.
        OSError: the file cannot be read.
    """
    with opened(source) as (name, lines):
        header = read_header(name, next(lines, ""))
        if header.run is None:
            raise ValueError(
                f"{name} has no times of requests and steps: a scheduler without an engine wrote it. Take the log of "
                "an engine, as `LLM(..., decision_log=...)` writes it."
            )
        reader = _Reader(LoggedRun(name, header, header.run))
        for number, entry in entries(name, lines):
            try:
                reader.take(entry)
            except KeyError as error:
                raise ValueError(
                    f"{name} is damaged at line {number}: it has no request {error} before that."
                ) from None
    if not reader.run.requests:
        raise ValueError(f"{name} has no request: there is nothing to tell of.")
    return reader.run


class _Reader:
    """A log that is being read."""

    def __init__(self, run: LoggedRun) -> None:
        self.run = run
        self._now = 0.0
        self._steps: dict[tuple[int, int], LoggedStep] = {}  # by mesh and number, those not read yet
        config = run.header.config
        self._caps = [config.pages_to_send(window) for window in config.windows]
        self._sizes: dict[int, int] = {}  # by transfer, until it is scattered
        self._gathered, self._scattered = Counter[int](), Counter[int]()  # by mesh, bytes since its last step

    def take(self, entry: object) -> None:
        """Take in one line."""
        match entry:
            case list():
                for action in entry:
                    self._decided(action)
            case RequestStamps(request_id=id_):
                self.run.requests[id_].stamps = entry
            case StepStamps(mesh=mesh, step=number):
                step = self._steps.pop((mesh, number), None)
                if step is not None:
                    step.stamps = entry
            case TransferStamps():
                self.run.transfers.append(entry)
            case _ if not isinstance(entry, Note):
                self._happened(entry)  # type: ignore[arg-type]

    def _happened(self, event: Event) -> None:
        self._now = max(self._now, event.t)
        match event:
            case Arrived(t=t, facts=facts):
                self.run.requests[facts.id] = LoggedRequest(facts, t, hashes=list(facts.block_hashes))
            case StepDone():
                self._step_done(event)
            case AbortRequested():
                self.run.aborts.append(event)
            case SetRoles():
                self.run.roles.append(event)
            case _:
                self._count(event)

    def _count(self, event: Event) -> None:
        name = type(event).__name__
        self.run.others[name] = self.run.others.get(name, 0) + 1

    def _step_done(self, event: StepDone) -> None:
        for outcome in event.outcomes:
            request = self.run.requests[outcome.request_id]
            request.tokens += 1
            request.last_token = self._now
            if request.first_token is None:
                request.first_token = self._now
            if outcome.block_hash is not None:
                request.hashes.append(outcome.block_hash)
            if outcome.stopped or request.tokens == request.facts.max_tokens:
                request.finish = self._now

    def _decided(self, action: Action) -> None:
        if isinstance(action, Prefill | Decode | Fused):
            moved = self._gathered.pop(action.mesh, 0), self._scattered.pop(action.mesh, 0)
            step = self._steps[action.mesh, action.step] = LoggedStep(action, None, *moved)
            self.run.steps.append(step)
            for chunk in step.chunks:
                self._computes(chunk, step)
        elif isinstance(action, StartTransfer):
            size = self.run.header.pools[action.source].transfer_bytes(action.bucket, self._caps)
            self._sizes[action.transfer] = size
            self._gathered[action.source] += size
        elif isinstance(action, Scatter):
            self._scattered[action.destination] += self._sizes.pop(action.transfer, 0)
        elif isinstance(action, Finish):
            request = self.run.requests[action.request_id]
            request.reason = action.reason
            request.finish = self._now if request.finish is None else request.finish

    def _computes(self, chunk: Chunk, step: LoggedStep) -> None:
        request = self.run.requests[chunk.request_id]
        if request.first_token is not None:
            return
        if request.prefill_start is None:
            request.prefill_start, request.cached = self._now, chunk.write_from
        request.steps.append(step)
