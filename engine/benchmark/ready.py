"""Requests made before they are due: drawn, checked, hashed and named, so that sending one takes little.

Invariants: a request is made once, and given away once; those that lie ready have no more than `AHEAD` prompt tokens
together, but for one. What goes on with a conversation cannot be made before the answer that it goes on with is there,
so it is made when it is planned. Single-threaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..api.client import EngineClient, Ticket
from ..api.job import Job
from ..api.sampling_params import SamplingParams
from ..simulation.workload import WorkRequest
from .prompts import Prompts

AHEAD = 1 << 20  # prompt tokens that lie ready

type MakeTicket = Callable[[int, Job], Ticket]  # of a request's number


class Ready:
    """The requests of one load that are still to be sent."""

    def __init__(
        self,
        client: EngineClient,
        works: Sequence[WorkRequest],
        prompts: Prompts,
        going_on: frozenset[int],
        ticket: MakeTicket,
    ) -> None:
        """Begin with none made; those of the numbers `going_on` wait for the answers before them."""
        self._client, self._works, self._prompts, self._going_on = client, works, prompts, going_on
        self._ticket = ticket
        self._made: dict[int, tuple[Ticket, Job]] = {}
        self._tokens = 0  # of prompts that lie ready
        self._next = 0  # number of the first that was not looked at
        self._taken: set[int] = set()  # made without having been looked at: out of the order of numbers
        self._params: dict[int, SamplingParams] = {}  # by length of answer

    def make_next(self) -> bool:
        """Make one more, in the order of numbers; return whether there was one to make and room for it."""
        while self._next < len(self._works):
            number = self._next
            if number in self._going_on or number in self._taken:
                self._taken.discard(number)
                self._next += 1
            elif self._tokens >= AHEAD:
                return False
            else:
                self._next += 1
                self.make(number)
                return True
        return False

    def make(self, number: int, before: np.ndarray | None = None) -> None:
        """Make a request if it was not; `before` [n] int32 are the tokens of the conversation that it goes on with.

        Raises:
            ValueError: it can never be served.
        """
        if number in self._made:
            return
        work = self._works[number]
        ids = self._prompts.ids(number, work, before)
        job = self._client.check(ids, self._params_of(work.output_len), service=work.served)
        self._made[number] = self._ticket(number, job), job
        self._tokens += work.prompt_len
        if number >= self._next:
            self._taken.add(number)

    def take(self, number: int, due: float, after: int | None) -> tuple[Ticket, Job]:
        """Give a request away, made if it was not, as one that arrives at `due`; its caller had it tokenised then.

        `after`: the engine's id of the request that it waited for; None: it came at a time of its own.
        """
        self.make(number)
        ticket, job = self._made.pop(number)
        self._tokens -= len(job.prompt.ids)
        made = self._client.clock() if job.tokenised is None else job.tokenised
        tokenised, entered = max(due, made), max(due, self._client.clock())
        stamped = [
            replace(one, arrival=due, tokenised=tokenised, entered=entered, after=after) for one in ticket.submissions
        ]
        return replace(ticket, submissions=tuple(stamped)), job

    def _params_of(self, length: int) -> SamplingParams:
        found = self._params.get(length)
        if found is None:
            found = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            self._params[length] = found
        return found
