"""An engine core without an engine: it keeps what is submitted, and sends the updates that a test writes."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from helpers.tiny_gguf import CHAT_TEMPLATE, TOKENIZER
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.core.submission import Update
from twinmesh.engine.errors import EngineError
from twinmesh.engine.protocol.results import TokenScores
from twinmesh.engine.protocol.sampling_plan import MAX_LOGPROBS
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.startup.build import Engine
from twinmesh.engine.topology import Topology
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

CONFIG = EngineConfig(Topology.parse("both=1"), max_model_len=64, page_size=4)


class FakeCore:
    """An engine core that computes nothing.

    With `answers` every request is answered at once, from another thread, by `answer`.
    """

    def __init__(self, *, answers=False):
        self.running = {}  # submissions by id, in order of arrival
        self.said = []  # calls of abort, preempt, migrate, update_params and set_roles
        self.batches, self.is_closed = [], False
        self._answers, self._thread, self._ticks = answers, ThreadPoolExecutor(1), itertools.count()
        self.timelines, self._lock = {}, threading.Lock()
        self.ids = itertools.count()

    def clock(self):
        return float(next(self._ticks))

    def names(self):
        """List the callers' names of running requests, one for each completion."""
        return [submission.sink.collector.request_id for submission in self.running.values()]

    def submit(self, submissions):
        if self.is_closed:
            raise EngineError("the engine is closed: make a new LLM.")
        self.batches.append([submission.facts.id for submission in submissions])
        self.running.update({submission.facts.id: submission for submission in submissions})
        self.timelines.update({s.facts.id: Timeline(s.arrival) for s in submissions})
        if self._answers:
            for submission in submissions:
                self._thread.submit(self.answer, submission)

    def answer(self, submission):
        """Repeat the prompt, token by token, as far as `max_tokens` allows."""
        ids = submission.prompt.tolist()[: submission.facts.max_tokens]
        for token in ids[:-1]:
            self.send(submission.facts.id, [token])
        self.send(submission.facts.id, ids[-1:], finish_reason="length")

    def send(self, which, token_ids=(), **fields):
        """Send an update of a completion, given by its id or its request's name; nothing, if it has ended."""
        with self._lock:  # the real one has a thread of its own for this
            ids = dict(zip(self.names(), self.running, strict=True)) if isinstance(which, str) else {which: which}
            id_ = ids.get(which)
            if id_ not in self.running:
                return
            submission, timeline = self.running[id_], self.timelines[id_]
            timeline.tokens.extend(self.clock() for _ in token_ids)
            if fields.get("finish_reason") is not None:
                timeline.finish = self.clock()
                del self.running[id_]
            outlet = submission.sink.put(Update(id_, timeline, list(token_ids), **fields))
        if outlet is not None:
            outlet.flush()

    def abort(self, id_):
        self.said.append(("abort", id_))
        self.send(id_, finish_reason="abort")

    def preempt(self, id_):
        self.said.append(("preempt", id_))

    def migrate(self, id_, destination=None):
        self.said.append(("migrate", id_, destination))

    def update_params(self, params):
        self.said.append(("update_params", params))

    def set_roles(self, roles, drain_timeout):
        self.said.append(("set_roles", roles, drain_timeout))
        return "reached"

    def roles(self):
        return ["prefill", "decode (draining prefill)"]

    def metrics(self):
        return SimpleNamespace(running=len(self.running))

    def close(self):
        self.is_closed = True
        for id_ in list(self.running):
            self.send(id_, finish_reason="abort")
        self._thread.shutdown()


def make_fake(kind, core, *, config=CONFIG, template=CHAT_TEMPLATE, tokenizer=None, **options):
    """Make an `LLM` or `AsyncLLM` over `core`."""
    tokenizer = tokenizer or tokenizer_from_gguf(TOKENIZER)
    chat_template = ChatTemplate(template, tokenizer, name="tiny")
    return kind.from_engine(Engine(core, config, tokenizer, chat_template), **options)


def scores(*rows):
    """Make token scores from rows, each a token's log-probability and rank, and the ids of the most likely tokens.

    The most likely tokens' log-probabilities are -1, -2, and so on; the rest of the columns is junk.
    """
    top_ids = np.full((len(rows), MAX_LOGPROBS), 99, np.int32)
    for row, (_, _, ids) in zip(top_ids, rows, strict=True):
        row[: len(ids)] = ids
    top_logprobs = np.tile(-np.arange(1, MAX_LOGPROBS + 1, dtype=np.float32), (len(rows), 1))
    logprob = np.array([logprob for logprob, _, _ in rows], np.float32)
    return TokenScores(logprob, np.array([rank for _, rank, _ in rows], np.int32), top_ids, top_logprobs)
