"""A running request on the dispatching thread: its tokens as they are read, whether one ends it, and its next update.

`take_token` runs once a row of every step, so what it needs of other objects is kept here. Which results belong to the
request is decided in `running_requests.py`, what follows from them in the scheduler.
"""

from array import array

import numpy as np

from ..config import EngineConfig
from ..paging.block_hash import next_block
from ..paging.block_table import Placement
from ..protocol.actions import Accept, Chunk
from ..protocol.events import Outcome
from ..protocol.results import HostScores, StepResult
from ..scheduler.request import Request
from .submission import Submission, Update


class RunningRequest:
    """One running request; `length` counts its tokens, prompt included."""

    def __init__(self, submission: Submission, request: Request, config: EngineConfig) -> None:
        """Begin with the prompt alone; `request` is the scheduler's own record of the request."""
        facts, plan = submission.facts, submission.plan
        self.submission, self.request = submission, request
        self.length = facts.prompt_len
        self.wants_scores = plan.logprobs is not None or plan.prompt_logprobs is not None
        self.update: Update | None = None  # not sent yet; None: nothing is new
        self.accepted_run: int | None = None  # the run for which the executor has the request's tokens
        self._accepted_at: Placement | None = None  # where the request was when it got them; None: on its way
        self._id, self._outputs, self._page_size = facts.id, array("i"), config.page_size
        self._stop, self._stop_ids = submission.stop, plan.stop_ids
        self._constraint = submission.constraint
        self._prompt_scores: list[HostScores] = []
        self._last_hash = facts.block_hashes[-1] if facts.block_hashes else b""
        hashes_all = len(facts.block_hashes) == facts.prompt_len // config.page_size
        # In deterministic mode an answer's pages do not feed the cache, and its conversation remembers their hashes.
        is_kept = not config.deterministic or facts.service.session is not None
        self._feeds_cache = hashes_all and config.prefix_cache and is_kept

    def new_update(self) -> Update:
        """Begin the next update."""
        self.update = Update(self._id)
        return self.update

    def accept(self, run: int) -> Accept:
        """What the executor needs of the request for this run, where the request is now: all tokens so far."""
        self.accepted_run, self._accepted_at = run, self.request.placement
        submission = self.submission
        return Accept(self._id, submission.prompt, submission.plan, np.array(self._outputs, np.int32))

    @property
    def tokens(self) -> np.ndarray:
        """Return a copy of all tokens so far: [length] int32."""
        return np.concatenate([self.submission.prompt, np.array(self._outputs, np.int32)])

    @property
    def is_accepted_here(self) -> bool:
        """Whether the executor got the tokens since the request came to where it is. One that has left again, by
        decisions that are still being performed, is nowhere, and counts as not accepted."""
        return self._accepted_at is not None and self._accepted_at is self.request.placement

    def take_prompt_scores(self, row: Chunk, scores: HostScores | None) -> None:
        """Keep the scores of a chunk of the prompt; they are sent with the first token."""
        if row.start == 0:
            self._prompt_scores.clear()  # of an earlier run
        if scores is not None:
            self._prompt_scores.append(scores)

    def take_scores(self, result: StepResult, step: int, index: int) -> None:
        """Take the scores of row `index`'s token, which is about to be taken."""
        update = self.update or self.new_update()
        if self.submission.plan.logprobs is not None:
            update.scores.append(result.score_of(step, index))
        update.prompt_scores += self._prompt_scores
        self._prompt_scores.clear()

    def take_token(self, token: int) -> Outcome:
        """Take the request's next token; return what it means to the scheduler."""
        self._outputs.append(token)
        self.length += 1
        update = self.update or self.new_update()
        update.token_ids.append(token)
        stopped = (self._stop is not None or token in self._stop_ids) and self._is_stopped(update, token)
        if self._constraint is not None:
            self._constraint.push(token)
            # Where the model has no token that ends an answer, the end of the grammar does.
            stopped = stopped or (not self.submission.eos_ids and self._constraint.is_over)
        return Outcome(self._id, stopped, None if self.length % self._page_size else self._block_hash())

    def _is_stopped(self, update: Update, token: int) -> bool:
        """Return whether the token ends the request; note why, unless it is the model's own end."""
        found = None if self._stop is None else self._stop.push(token)
        if token in self._stop_ids:
            update.stop_reason = None if token in self.submission.eos_ids else token
            return True
        update.stop_reason = found
        return found is not None

    def _block_hash(self) -> bytes | None:
        """Hash the page that the newest token fills; None where the request does not feed the prefix cache."""
        if not self._feeds_cache:
            return None
        prompt, size = self.submission.prompt, self._page_size
        tail = [*prompt[self.length - size :].tolist(), *self._outputs[-size:]][-size:]
        self._last_hash = next_block(self._last_hash, tail)
        return self._last_hash
