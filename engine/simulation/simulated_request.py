"""A request of a workload while the simulated engine has it: no tokens, but what they would mean.

Its page hashes come from the workload's blocks, the answer's too, so that a later prompt which goes on with the answer
finds it cached where the real engine would. Its sink makes its record when it ends.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..config import EngineConfig
from ..core.running_request import RunningRequest
from ..core.submission import Submission, Update
from ..metrics.request_records import RequestRecord, divide_ttft
from ..protocol.actions import Accept
from ..protocol.events import Outcome, RequestFacts
from ..protocol.sampling_plan import SamplingPlan
from ..scheduler.request import Request
from .workload import Workload, WorkRequest, page_hashes

_PLAN = SamplingPlan(temperature=0.0, seed=0)
_NO_TOKENS = np.empty(0, np.int32)
_ACCEPT = Accept(0, _NO_TOKENS, _PLAN, _NO_TOKENS)  # which a virtual executor does not look at
_NOBODY = frozenset[int]()


class SimulatedSink:
    """The caller of a simulated request, who is told of its end alone."""

    __slots__ = ("answer", "ended", "host", "number", "work")

    def __init__(self, number: int, work: WorkRequest, answer: tuple[bytes, ...], ended: "Ended") -> None:
        """`answer` are the hashes of the pages that the answer fills; `ended` is told of the end."""
        self.number, self.work, self.answer, self.ended = number, work, answer, ended
        self.host = 0.0  # seconds from the call to the event

    def put(self, update: Update) -> None:
        """Take an update; the last one ends the request."""
        if update.finish_reason is not None:
            self.ended(self, update)

    def record(self, update: Update) -> RequestRecord:
        """Make the request's record of its last update."""
        line, reason = update.timeline, update.finish_reason
        assert line is not None
        assert reason is not None
        tokens = len(line.tokens)
        first = line.first_token
        parts = divide_ttft(line.arrival, line.arrival + self.host, line.prefill_start, first)
        return RequestRecord(
            self.number,
            line.arrival,
            self.work.prompt_len,
            tokens,
            update.cache.cached_tokens if update.cache is not None else 0,
            first,
            line.tokens[-1] if tokens else None,
            line.finish,
            parts.queue,
            parts.prefill,
            line.handoff or 0.0,
            parts.host,
            reason,
            self.work.service.slo,
        )


type Ended = Callable[[SimulatedSink, Update], None]


class SimulatedRequest(RunningRequest):
    """A running request that counts its tokens instead of keeping them."""

    def __init__(self, submission: Submission, request: Request, config: EngineConfig) -> None:
        super().__init__(submission, request, config)
        assert isinstance(submission.sink, SimulatedSink)
        self._answer = submission.sink.answer if config.prefix_cache else ()
        self._first_page = submission.facts.prompt_len // config.page_size

    def accept(self, run: int) -> Accept:
        """Note that the executor has the request."""
        self.accepted_run, self._accepted_at = run, self.request.placement
        return _ACCEPT

    @property
    def tokens(self) -> np.ndarray:
        """Return no tokens: there are none."""
        return _NO_TOKENS

    def take_token(self, token: int) -> Outcome:
        """Count the request's next token; return what it means to the scheduler."""
        self.length += 1
        if self.length % self._page_size:
            return Outcome(self._id, False)
        page = self.length // self._page_size - 1 - self._first_page
        return Outcome(self._id, False, self._answer[page] if page < len(self._answer) else None)

    def take_tokens(self, count: int) -> Sequence[bytes]:
        """Count the request's next tokens; return the hashes, as far as there are any, of the pages that they fill."""
        size, first = self._page_size, self._first_page
        before, self.length = self.length, self.length + count
        if not self._answer or before // size == self.length // size:
            return ()
        return self._answer[before // size - first : self.length // size - first]


def make_submission(
    number: int,
    work: WorkRequest,
    workload: Workload,
    page_size: int,
    arrival: float,
    tokenised: float,
    ended: Ended,
) -> Submission:
    """Make of a workload's request what the core takes; `arrival` is when its caller called, `tokenised` when its
    prompt will be tokens."""
    whole = page_hashes(work.blocks, workload.block_tokens, work.prompt_len + work.output_len, page_size)
    pages = work.prompt_len // page_size
    facts = RequestFacts(number, work.prompt_len, work.output_len, whole[:pages], None, work.served)
    sink = SimulatedSink(number, work, whole[pages:], ended)
    return Submission(arrival, facts, _NO_TOKENS, _PLAN, _NOBODY, None, sink, tokenised, tokenised, work.after)
