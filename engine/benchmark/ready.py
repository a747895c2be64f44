"""Requests made before they are due: their prompts drawn and checked, so that sending one takes little.

Invariants: a request is made once, and given away once; at most `_AHEAD` lie ready. What goes on with a conversation
cannot be made before the answer that it goes on with is there, so it is made when it is planned. Single-threaded.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..api.client import EngineClient
from ..api.job import Job
from ..api.sampling_params import SamplingParams
from ..simulation.workload import WorkRequest
from .prompts import Prompts

_AHEAD = 256  # requests that lie ready at most


class Ready:
    """The requests of one load that are still to be sent."""

    def __init__(
        self, client: EngineClient, works: Sequence[WorkRequest], prompts: Prompts, going_on: frozenset[int]
    ) -> None:
        """Begin with none made; those of the numbers `going_on` wait for the answers before them."""
        self._client, self._works, self._prompts, self._going_on = client, works, prompts, going_on
        self._made: dict[int, Job] = {}
        self._next = 0  # number of the first that was not looked at
        self._taken: set[int] = set()  # sent without having been looked at: out of the order of numbers
        self._params: dict[int, SamplingParams] = {}  # by length of answer

    def make_next(self) -> bool:
        """Make one more, in the order of numbers; return whether there was one to make and room for it."""
        while self._next < len(self._works):
            number = self._next
            if number in self._going_on or number in self._made or number in self._taken:
                self._taken.discard(number)
                self._next += 1
                continue
            if len(self._made) >= _AHEAD:
                return False
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
        self._made[number] = self._client.check(ids, self._params_of(work.output_len), service=work.served)
        if number >= self._next:
            self._taken.add(number)

    def take(self, number: int, due: float) -> Job:
        """Give a request away, made if it was not, as one that arrives at `due`."""
        self.make(number)
        job = self._made.pop(number)
        # Made ahead: its caller had it tokenised when it came.
        return replace(job, arrival=due, tokenised=max(due, job.tokenised or due))

    def _params_of(self, length: int) -> SamplingParams:
        found = self._params.get(length)
        if found is None:
            found = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            self._params[length] = found
        return found
