"""The callers of a simulated engine: each request comes at its time, or some time after another has ended.

They are one server: a prompt is tokenised when those before it are, and comes to the engine after that. Where the
waiting room is full they are turned away, once and for all. Invariants: of requests with times of their own one is
looked at ahead, so that a workload of any length takes no memory; those that wait for others are kept from the start,
since they may come before ones that are further ahead in the workload.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

from ..config import EngineConfig
from ..core.submission import Submission, Update
from ..core.waiting_room import WaitingRoom
from ..errors import Overloaded
from ..metrics.gaps import Gaps
from ..metrics.request_records import RequestRecord
from ..scheduler.cost_model import HostCost
from .simulated_request import SimulatedSink, make_submission
from .virtual_time import VirtualTime
from .workload import Workload, WorkRequest, checked

type Entry = tuple[int, WorkRequest]


class Arrivals:
    """Sends the requests of one workload."""

    def __init__(
        self,
        workload: Workload,
        config: EngineConfig,
        host: HostCost,
        time: VirtualTime,
        room: WaitingRoom,
        submit: Callable[[Submission], None],
        record: Callable[[RequestRecord], None],
        gaps: Gaps | None,
        stop_after: float,
    ) -> None:
        """Plan the first arrival; `submit` takes requests that enter, `record` what became of each, and `gaps` counts
        those between tokens. Nobody comes at or after `stop_after`.

        Raises:
            ValueError: a request that cannot be, or that `config` has no room for.
        """
        self._workload, self._config, self._host, self._time = workload, config, host, time
        self._room, self._submit, self._record, self._gaps = room, submit, record, gaps
        self._following: defaultdict[int, list[Entry]] = defaultdict(list)  # number -> those that wait for its end
        self._stop_after = stop_after
        self._free = 0.0  # when the callers are done with what they tokenise
        self.left = 0  # requests that have not ended and will
        self._check()
        self._ahead: Iterator[Entry] = enumerate(workload.requests)
        self._plan_next()

    def _check(self) -> None:
        """Look at all requests once, and keep those that wait for others."""
        requests = checked(self._workload.requests, self._workload.name, self._config.max_model_len)
        for number, work in enumerate(requests):
            if work.at is None and work.after is not None:
                self._following[work.after].append((number, work))
            self.left += 1

    def _plan_next(self) -> None:
        """Plan the next request that has a time of its own."""
        for number, work in self._ahead:
            if work.at is None:
                continue
            if work.at < self._stop_after:
                self._time.at(work.at, self._come_and_go_on, (number, work))
                return
            self._forget(number)

    def _come_and_go_on(self, entry: Entry) -> None:
        self._plan_next()
        self._come(entry)

    def _come(self, entry: Entry) -> None:
        """Let a caller call now: its prompt is tokenised as soon as those before it are."""
        number, work = entry
        now, seconds = self._time.now, self._host.arrival + self._host.token * work.prompt_len
        self._free = max(now, self._free) + seconds
        submission = make_submission(number, work, self._workload, self._config.page_size, now, self._free, self._ended)
        if self._free > now:
            self._time.at(self._free, self._enter, submission)
        else:
            self._enter(submission)

    def _enter(self, submission: Submission) -> None:
        """Submit a request, or turn it away."""
        now, sink = self._time.now, submission.sink
        assert isinstance(sink, SimulatedSink)
        sink.host = now - submission.arrival
        if self._room.is_bounded:
            try:
                self._room.enter_or_refuse((submission,))
            except Overloaded:
                work = sink.work
                slo = work.service.slo
                self._end(RequestRecord(sink.number, submission.arrival, work.prompt_len, 0, reason="refused", slo=slo))
                return
        self._submit(submission)

    def _ended(self, sink: SimulatedSink, update: Update) -> None:
        if self._gaps is not None and update.timeline is not None:
            for gap in update.timeline.itl:
                self._gaps.add(gap)
        self._end(sink.record(update))

    def _end(self, record: RequestRecord) -> None:
        """Take in that a request has ended, and plan those that wait for it."""
        self._record(record)
        self.left -= 1
        for number, work in self._following.pop(record.number, ()):
            due = self._time.now + work.pause
            if due < self._stop_after:
                self._time.at(due, self._come, (number, work))
            else:
                self._forget(number)

    def _forget(self, number: int) -> None:
        """Let a request not come, nor those that wait for it."""
        forgotten = [number]
        while forgotten:
            self.left -= 1
            forgotten += [one for one, _ in self._following.pop(forgotten.pop(), ())]
