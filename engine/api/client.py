"""The way of a request into the engine and back, for `LLM` and `AsyncLLM` alike.

Invariants: whatever can be refused is refused before a request starts; the completions of a request enter together;
a request's name stands for all its completions, and for nothing else as long as one of them runs. Nothing waits here:
how updates reach the caller is the caller's choice.

Every method may be called from any thread.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

import numpy as np
from msgspec.structs import replace

from ..chat.answers import AnswerFormat
from ..core.submission import Submission
from ..paging.block_hash import block_hashes, salted
from ..protocol.events import RequestFacts
from ..protocol.sampling_plan import SamplingPlan
from ..protocol.service import DEFAULT, Service
from ..startup.build import Engine
from ..structured.grammar import Grammar, Grammars
from .active_requests import ActiveRequest, ActiveRequests, Post
from .collector import RequestCollector
from .detokenizer import StopSearch
from .job import Job
from .prompts import Prompt, PromptLike, check_ids_or_text, check_prompt, check_texts
from .resolve_sampling import eos_ids, resolve
from .sampling_params import SamplingParams, check_params

# Prompts of a list that are tokenised together: few at first, so that devices have work soon, and then more.
_FIRST_BLOCK, _LAST_BLOCK = 32, 1024


@dataclass(frozen=True)
class Ticket:
    """A request ready to enter, with one submission per completion."""

    request: ActiveRequest
    submissions: tuple[Submission, ...]

    @property
    def collector(self) -> RequestCollector:
        """Return the collector that gathers the request's updates."""
        return self.request.collector


class EngineClient:
    """The client of one engine's core: it checks requests, starts them, and finds them again by name."""

    def __init__(self, engine: Engine, seed: int) -> None:
        """Serve `engine`. Requests without a seed of their own draw theirs from `seed` and from their number."""
        self._core, self.config, self.tokenizer = engine.core, engine.config, engine.tokenizer
        self._seed, self._numbers, self._active = seed, itertools.count(), ActiveRequests()
        # What ids of tool calls are made of besides: no other engine's are the same, unless a run is to be repeated.
        self._name = f"seed {seed}" if self.config.deterministic else uuid4().hex
        self._grammars = Grammars(engine.tokenizer)

    def clock(self) -> float:
        """Return the time on the engine's clock, in seconds."""
        return self._core.clock()

    def resolve(self, params: SamplingParams) -> SamplingPlan:
        """Check parameters against this model, and make their plan; raises ValueError as `resolve_sampling` does."""
        return resolve(params, self.tokenizer, 0, self.config.max_logprobs)

    def check(
        self,
        prompt: PromptLike,
        params: SamplingParams | None,
        arrival: float | None = None,
        service: Service = DEFAULT,
        reasoning_end: bytes | None = None,
    ) -> Job:
        """Check a request that is to be started, served in this way, and that arrived at this time.

        None: now, and the default parameters. `reasoning_end`: behind it begins what an answer's grammar is for, where
        the parameters say nothing of that (`structured/grammar.py`); None: at once.

        Raises:
            ValueError: a prompt or parameters that this model cannot run.
        """
        arrival = self.clock() if arrival is None else arrival
        params = own_params([SamplingParams() if params is None else params])[0]
        _refuse_trace(params)
        checked = check_prompt(prompt, self.tokenizer, self.config.max_model_len)
        plan, grammar = self.resolve(params), self.grammar(params, reasoning_end)
        return Job(checked, params, plan, arrival, service, self.clock(), grammar)

    def grammar(self, params: SamplingParams, reasoning_end: bytes | None = None) -> Grammar | None:
        """Compile what answers have to keep to, and what devices need for it; None: they keep to nothing.

        Raises:
            ValueError: it cannot be kept to.
        """
        if params.structured_outputs is None:
            return None
        made = self._grammars.compile(params.structured_outputs, reasoning_end)
        self._core.prepare_masks()
        return made

    def check_chat(
        self,
        rendered: str | list[int],
        params: SamplingParams | None,
        arrival: float,
        service: Service,
        answers: AnswerFormat | None,
        reasoning_end: bytes | None = None,
    ) -> Job:
        """Check a conversation, in the words of the chat template or its tokens, as `check` does a prompt."""
        if isinstance(rendered, str):
            most = self.config.max_model_len
            rendered_ids = check_texts([rendered], self.tokenizer, most, is_rendered=True)[0]
            rendered = {"prompt": rendered, "prompt_token_ids": rendered_ids.ids}  # type: ignore[assignment]
        return dataclasses.replace(self.check(rendered, params, arrival, service, reasoning_end), answers=answers)

    def check_all(
        self,
        prompts: Sequence[PromptLike],
        params: Sequence[SamplingParams],
        arrival: float,
        services: Sequence[Service],
    ) -> Iterator[Job]:
        """Check requests that arrived together. All is checked at once but the lengths of texts, which are tokenised in
        blocks as the jobs are taken, so that devices work on the first meanwhile.

        Raises:
            ValueError: as `check`; of a text's length when its job is due.
        """
        params = own_params(params)
        plans = self._plans(params)
        given = [check_ids_or_text(prompt, self.tokenizer, self.config.max_model_len) for prompt in prompts]
        blocks = (check_texts(block, self.tokenizer, self.config.max_model_len) for block in _blocks(given))
        return self._jobs(blocks, params, plans, arrival, services)

    def check_rendered(
        self,
        rendered: Sequence[str | list[int]],
        params: Sequence[SamplingParams],
        arrival: float,
        services: Sequence[Service],
        answers: Sequence[AnswerFormat | None],
        reasoning_ends: Sequence[bytes | None],
    ) -> Iterator[Job]:
        """Check conversations, in the words of the chat template or its tokens, as `check_all` does prompts; `answers`
        read theirs, where they are known, and `reasoning_ends` are as for `check`."""
        params = own_params(params)
        for one in params:
            _refuse_trace(one)
        plans, most = self._plans(params), self.config.max_model_len
        given = [one if isinstance(one, str) else check_prompt(one, self.tokenizer, most) for one in rendered]
        blocks = (check_texts(block, self.tokenizer, most, is_rendered=True) for block in _blocks(given))
        jobs = self._jobs(blocks, params, plans, arrival, services, reasoning_ends)
        return (dataclasses.replace(job, answers=reads) for job, reads in zip(jobs, answers, strict=True))

    def _jobs(
        self,
        blocks: Iterable[Sequence[Prompt]],
        params: Sequence[SamplingParams],
        plans: Mapping[int, SamplingPlan],
        arrival: float,
        services: Sequence[Service],
        reasoning_ends: Sequence[bytes | None] | None = None,
    ) -> Iterator[Job]:
        ends = [None] * len(params) if reasoning_ends is None else reasoning_ends
        asked = {(id(one), end): (one, end) for one, end in zip(params, ends, strict=True)}
        grammars = {key: self.grammar(*each) for key, each in asked.items()}
        prompts = itertools.chain.from_iterable(blocks)
        return (
            Job(prompt, one, plans[id(one)], arrival, service, self.clock(), grammars[id(one), end])
            for prompt, one, service, end in zip(prompts, params, services, ends, strict=True)
        )

    def _plans(self, params: Sequence[SamplingParams]) -> dict[int, SamplingPlan]:
        """Resolve parameters, each once, by their Python id: many requests share them."""
        return {id_: self.resolve(one) for id_, one in {id(one): one for one in params}.items()}

    def ticket(self, job: Job, post: Post, request_id: str | None = None, after: int | None = None) -> Ticket:
        """Give a request its name, ids, seeds and sink; `post` gets its updates once it starts.

        `after`: the completion whose end it waited for, if its caller keeps only so many at once.

        Raises:
            ValueError: the name is not a text, or empty.
        """
        number = next(self._numbers)
        request_id = self._new_name(number) if request_id is None else check_name(request_id)
        ids = tuple(next(self._core.ids) for _ in range(job.params.n))
        name = f"{self._name}:{number}" if job.name is None else job.name
        whose = ids, job.prompt, job.params, self.tokenizer, job.arrival, job.answers, name
        collector = RequestCollector(request_id, *whose)
        request = ActiveRequest(post, collector, self._active)
        entered, hashes = self.clock(), self._block_hashes(job)
        submissions = [
            Submission(
                arrival=job.arrival,
                facts=self._facts(job, id_, ids[0] if index else None, hashes),
                prompt=job.prompt.ids,
                plan=self._plan(job, index, seed),
                eos_ids=eos_ids(job.params, self.tokenizer),
                stop=self._stop_check(job),
                sink=request,
                constraint=None if job.grammar is None else job.grammar.matcher(job.prompt.ids),
                tokenised=job.tokenised,
                entered=entered,
                after=after,
                chain=_chain(job),
            )
            for index, (id_, seed) in enumerate(zip(ids, self._seeds(job.params, number), strict=True))
        ]
        return Ticket(request, tuple(submissions))

    def start(self, ticket: Ticket, *, may_refuse: bool = False) -> None:
        """Start a request: submit all of its completions to the engine. Where as many wait as may, wait for room, or
        refuse it if it `may_refuse`.

        Raises:
            ValueError: its name is in use.
            EngineError: the engine is closed or has failed.
            Overloaded: there is no room.
        """
        self._active.add(ticket.request)
        try:
            self._core.submit(ticket.submissions, may_refuse=may_refuse)
        except BaseException:  # an interrupt may come after the engine has taken it
            for sequence_id in ticket.collector.sequence_ids:
                self._core.abort(sequence_id)
                self._active.end(ticket.request, sequence_id)
            raise

    def abort(self, request_id: str) -> None:
        """End every completion of a request; a name not in use is ignored."""
        for sequence_id in self._active.sequences(request_id):
            self._core.abort(sequence_id)

    def abort_all(self) -> None:
        """End every completion of every request that runs."""
        for sequence_id in self._active.all_sequences():
            self._core.abort(sequence_id)

    def withdraw(self, collector: RequestCollector) -> None:
        """End every completion of this very request, whatever has its name by now."""
        for sequence_id in collector.running:
            self._core.abort(sequence_id)

    def serve(self, collector: RequestCollector, service: Service) -> None:
        """Serve every completion of this very request in another way from here on."""
        for sequence_id in collector.running:
            self._core.serve(sequence_id, service)

    def preempt(self, request_id: str) -> None:
        """Give up the KV of every completion of a request; a name not in use is ignored."""
        for sequence_id in self._active.sequences(request_id):
            self._core.preempt(sequence_id)

    def migrate(self, request_id: str, destination: int | None) -> None:
        """Move every completion of a request; a name not in use is ignored."""
        for sequence_id in self._active.sequences(request_id):
            self._core.migrate(sequence_id, destination)

    def _new_name(self, number: int) -> str:
        name = f"request-{number}"
        while name in self._active:  # callers may name theirs alike
            name += "+"
        return name

    def _facts(self, job: Job, id_: int, leader: int | None, hashes: tuple[bytes, ...]) -> RequestFacts:
        length = len(job.prompt.ids)
        room = self.config.max_model_len - length
        asked = job.params.max_tokens
        most = room if asked is None else min(int(asked), room)
        return RequestFacts(id_, length, most, hashes, leader, job.service, job.grammar is not None)

    def _block_hashes(self, job: Job) -> tuple[bytes, ...]:
        """Hash those of the prompt's pages that the prefix cache may have; none where it is off. Tokens after which
        others are scored have to be computed."""
        if not self.config.prefix_cache:
            return ()
        scored_from = None if job.plan.prompt_logprobs is None else job.scored_from or 1
        cached = job.prompt.ids if scored_from is None else job.prompt.ids[: scored_from - 1]
        return block_hashes(cached, self.config.page_size, _chain(job))

    def _plan(self, job: Job, index: int, seed: int) -> SamplingPlan:
        """Return a completion's plan; only the first completion, which computes the prompt, reports prompt_logprobs."""
        wanted = None if index else job.plan.prompt_logprobs
        first = job.scored_from or 1
        return replace(job.plan, seed=seed, prompt_logprobs=wanted, scored_from=first, alternatives=job.alternatives)

    def _seeds(self, params: SamplingParams, number: int) -> list[int]:
        if params.seed is not None:
            return [(_folded(int(params.seed)) + i) % 2**32 for i in range(params.n)]
        return [int(word) for word in np.random.SeedSequence([self._seed, number]).generate_state(params.n)]

    def _stop_check(self, job: Job) -> StopSearch | None:
        if not job.params.stop:
            return None
        return StopSearch(
            self.tokenizer,
            tuple(job.params.stop),
            min_tokens=job.params.min_tokens,
            skip_special=job.params.skip_special_tokens,
            after=job.prompt.token_ids,
        )


def own_params(params: Sequence[SamplingParams]) -> list[SamplingParams]:
    """Return parameters that their caller cannot assign to; those that several share stay shared.

    Raises:
        ValueError: no `SamplingParams`, or something that was assigned is out of range.
    """
    own = {key: check_params(one).clone() for key, one in {id(one): one for one in params}.items()}
    return [own[id(one)] for one in params]


def _refuse_trace(params: SamplingParams) -> None:
    if params.trace_decode_token_ids is not None:
        raise ValueError("trace_decode_token_ids are for LLM.generate: it replays them, and nothing else does.")


def _chain(job: Job) -> bytes:
    return b"" if job.prompt.salt is None else salted(job.prompt.salt)


def _folded(seed: int) -> int:
    """Fold a seed into the 32 bits that draws take; seeds below 2**32 stay as they are."""
    high = seed >> 32
    return seed % 2**32 if not high else int(np.random.SeedSequence([seed % 2**32, high]).generate_state(1)[0])


def _blocks[T](items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut a list into blocks, few items at first and then more."""
    start, size = 0, _FIRST_BLOCK
    while start < len(items):
        yield items[start : start + size]
        start, size = start + size, min(2 * size, _LAST_BLOCK)


def check_name(request_id: object) -> str:
    """Check and return a caller's name for a request; raise ValueError unless it is a text that is not empty."""
    if isinstance(request_id, str) and request_id:
        return request_id
    raise ValueError(f"request_id={request_id!r} is not usable: it must be a text that is not empty.")
