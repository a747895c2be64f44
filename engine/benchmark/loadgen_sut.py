"""The system under test of LoadGen's that an engine is: it answers the samples that LoadGen issues.

`issue` is called on the thread that runs LoadGen's test, and only starts requests. The engine's dispatching thread puts
first tokens and ends into a queue; a thread of our own reports them with `FirstTokenComplete` and
`QuerySamplesComplete`, which LoadGen stamps. LoadGen knows no failed requests and waits for every one: one that fails
is reported as done with what it has, and is in our records what it is.
"""

import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from ..api.client import EngineClient
from ..api.job import Job
from ..api.sampling_params import SamplingParams
from ..core.submission import Update
from ..simulation.workload import WorkRequest
from .driver import Driven
from .prompts import Prompts
from .tally import Tally


class Sample(Protocol):
    """A sample of a query as LoadGen issues it, valid during the call."""

    id: int  # of the answer
    index: int  # of the sample in the data set


class _Sent(NamedTuple):
    """A request that runs."""

    number: int  # in the order in which they were issued
    id: int  # LoadGen's
    job: Job
    sequence_id: int
    answer: list[int]  # grows on the dispatching thread


class _News(NamedTuple):
    """What LoadGen is to be told: an end, or without an update a first token."""

    of: _Sent
    last: Update | None


class SystemUnderTest:
    """Answers samples on an engine: `load` first, then `issue`, and `finish` at the end."""

    def __init__(
        self, loadgen: Any, client: EngineClient, samples: Sequence[WorkRequest], accepted: Mapping[int, float]
    ) -> None:
        """Serve samples on an engine.

        Args:
            loadgen: the module.
            client: the engine's.
            samples: of the data set, each with its lengths.
            accepted: by the engine's id of a request, when it was taken in; an observer fills it meanwhile.
        """
        self._loadgen, self._client, self._samples, self._accepted = loadgen, client, samples, accepted
        self._prompts = Prompts(client.tokenizer.vocab_size, 1)
        self._jobs: dict[int, Job] = {}  # of the loaded samples, by index
        self._issued = 0
        self._tally = Tally()
        self._news: SimpleQueue[_News | None] = SimpleQueue()
        self.failure: Exception | None = None  # why samples could not be started or answered
        self.over = threading.Event()  # with a failure; whoever runs the test sets it at the end
        self._reporter = threading.Thread(target=self._report, name="twinmesh-loadgen", daemon=True)
        self._reporter.start()

    def load(self, indices: Iterable[int]) -> None:
        """Make the prompts of these samples; LoadGen's clock does not run."""
        for index in indices:
            work = self._samples[index]
            params = SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True, detokenize=False)
            self._jobs[index] = self._client.check(self._prompts.ids(index, work), params)

    def unload(self, indices: Iterable[int]) -> None:
        """Drop the prompts of these samples."""
        for index in indices:
            self._jobs.pop(index, None)

    def issue(self, samples: Iterable[Sample]) -> None:
        """Start a request for each sample; with a `failure` the call never returns, since nothing ends LoadGen early
        and what raises here would pass through it."""
        now = self._client.clock()
        try:
            for sample in samples:
                self._start(sample.id, replace(self._jobs[sample.index], arrival=now, tokenised=now))
        except Exception as error:
            self._fail(error)
            threading.Event().wait()

    def _start(self, id_: int, job: Job) -> None:
        sent: _Sent
        ticket = self._client.ticket(job, lambda _, update: self._post(sent, update))
        sent = _Sent(self._issued, id_, job, ticket.collector.sequence_ids[0], [])
        self._issued += 1
        self._client.start(ticket)

    def flush(self) -> None:
        """Know that no more comes; nothing is held back here."""

    def finish(self) -> Driven:
        """Return what has become of all, once LoadGen has the last answer."""
        self._news.put(None)
        self._reporter.join()
        return Driven(self._tally.records, self._tally.gaps, [], dict(self._tally.errors))

    def _post(self, sent: _Sent, update: Update) -> None:
        """On the dispatching thread."""
        is_first = bool(update.token_ids) and not sent.answer
        sent.answer.extend(update.token_ids)
        if is_first:
            self._news.put(_News(sent, None))
        if update.finish_reason is not None:
            self._news.put(_News(sent, update))

    def _report(self) -> None:
        """On a thread of its own."""
        try:
            while (news := self._news.get()) is not None:
                self._tell(*news)
        except Exception as error:  # without it the test would wait for ever
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.over.set()

    def _tell(self, sent: _Sent, last: Update | None) -> None:
        if last is None:
            self._respond(self._loadgen.FirstTokenComplete, sent.id, sent.answer[:1])
        else:
            self._end(sent, last)
            self._complete(sent.id, sent.answer)

    def _end(self, sent: _Sent, last: Update) -> None:
        assert last.timeline is not None
        assert last.finish_reason is not None
        self._tally.end(
            sent.number,
            len(sent.job.prompt.ids),
            last.timeline,
            last.finish_reason,
            taken_in=self._accepted.get(sent.sequence_id),
            cached_len=last.cache.cached_tokens if last.cache is not None else 0,
            error=last.error,
        )

    def _complete(self, id_: int, answer: Sequence[int]) -> None:
        if not answer:  # LoadGen wants a first token of every sample
            self._respond(self._loadgen.FirstTokenComplete, id_, [])
        self._respond(self._loadgen.QuerySamplesComplete, id_, answer)

    def _respond(self, tell: Any, id_: int, tokens: Sequence[int]) -> None:
        data = array("i", tokens)  # which has to live until LoadGen has read it
        address, count = data.buffer_info()
        tell([self._loadgen.QuerySampleResponse(id_, address, count * data.itemsize, count)])
