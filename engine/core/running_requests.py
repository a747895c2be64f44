"""The requests in the engine, by id: tokens in, updates out, and how each ends.

Invariant: every request that is added gets exactly one final update, by `finish` or by `end_all`. Updates are gathered
until `flush`, so that callers are woken once a turn. It decides nothing, and knows scheduler and executor only by what
they give. All but `figures` is for the dispatching thread.
"""

import threading
from collections.abc import Callable

from ..metrics.histograms import Seen
from ..metrics.metrics import RequestLog, Unfinished
from ..protocol.actions import Chunk, DecodeRow, Finish, FinishReason
from ..protocol.events import Outcome
from ..protocol.results import StepResult
from ..scheduler.request import Request, State
from .conversations import Conversations
from .running_request import RunningRequest
from .submission import Outlet


class RunningRequests(dict[int, RunningRequest]):
    """The requests that have not ended, and the log of those that have."""

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self.conversations = Conversations(page_size)
        self.dense: set[int] = set()  # ids of those with a dense row
        self.constrained: dict[int, RunningRequest] = {}  # those whose answer keeps to a grammar
        self._with_update: list[RunningRequest] = []
        self._outlets: dict[Outlet, None] = {}  # to be flushed: an ordered set
        self._log, self._lock = RequestLog(), threading.Lock()

    def figures(self, now: float) -> tuple[RequestLog, Unfinished]:
        """Return a copy of the log, and the requests that have not ended; from any thread."""
        with self._lock:
            log, running = self._log.snapshot(), list(self.values())
        requests = [one.request for one in running]
        waiting = State.WAITING
        arrivals = [request.timeline.arrival for request in requests if request.state is waiting]
        seen = [Seen(request.timeline, len(request.timeline.tokens), request.prompt_len) for request in requests]
        return log, Unfinished(seen, len(arrivals), max(0.0, now - min(arrivals)) if arrivals else 0.0)

    def add(self, running: RunningRequest) -> None:
        """Take a request in."""
        id_ = running.request.id
        with self._lock:
            self[id_] = running
        if running.submission.plan.is_dense:
            self.dense.add(id_)
        if running.submission.constraint is not None:
            self.constrained[id_] = running

    def take(self, result: StepResult, owner: Callable[[Chunk | DecodeRow], Request | None]) -> tuple[Outcome, ...]:
        """Take a step's tokens into their requests; return what they mean to the scheduler.

        `owner` finds the request that a row's result still counts for. The loop runs once for every row of every step,
        so it calls nothing that it does not need.
        """
        outcomes: list[Outcome] = []
        for index, (row, sampled) in enumerate(zip(result.rows, result.tokens.T.tolist(), strict=True)):
            request = owner(row)
            if request is None:  # it came too late
                continue
            running = self[request.id]
            if isinstance(row, Chunk):
                running.take_prompt_scores(row, result.prompt_scores.get(index))
                if not row.is_last:
                    continue
            if running.update is None:
                self._with_update.append(running)
            for step, token in enumerate(sampled):
                # A token that the request has already was generated again after a preemption.
                if row.kv_len + step < running.length:
                    continue
                if running.wants_scores:
                    running.take_scores(result, step, index)
                outcome = running.take_token(token)
                outcomes.append(outcome)
                if outcome.stopped:
                    break
        return tuple(outcomes)

    # ---- ends

    def finish(self, action: Finish) -> None:
        """End a request as the scheduler says, with the tokens that were not sent yet."""
        running = self[action.request_id]
        self.dense.discard(action.request_id)
        self.constrained.pop(action.request_id, None)
        with self._lock:
            del self[action.request_id]
            self._log_end(running.request, action.reason)
        self.conversations.end(running)
        self._send_last(running, action.reason, action.error)

    def end_all(self, reason: FinishReason, error: str | None, now: float) -> None:
        """End every request, whatever it waits for, and send all updates."""
        with self._lock:
            for running in self.values():
                running.request.timeline.finish = now
                self._log_end(running.request, reason)
            ended = list(self.values())
            self.clear()
        self.dense.clear()
        self.constrained.clear()
        for running in ended:
            self._send_last(running, reason, error)
        self.flush()

    def _log_end(self, request: Request, reason: FinishReason) -> None:
        self._log.add(request.timeline, request.confirmed, reason, request.slo, request.prompt_len)

    # ---- updates

    def flush(self) -> None:
        """Send tokens to their callers: once a turn, after the devices have their work."""
        for running in self._with_update:
            self._send(running)
        self._with_update.clear()
        for outlet in self._outlets:
            outlet.flush()
        self._outlets.clear()

    def _send_last(self, running: RunningRequest, reason: FinishReason, error: str | None) -> None:
        update = running.update or running.new_update()
        update.finish_reason, update.error = reason, error
        self._send(running)

    def _send(self, running: RunningRequest) -> None:
        update, running.update = running.update, None
        if update is not None:
            update.timeline, update.cache = running.request.timeline, running.request.cache
            outlet = running.submission.sink.put(update)
            if outlet is not None:
                self._outlets[outlet] = None
