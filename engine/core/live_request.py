"""A running request on the dispatching thread: its tokens as they are read, whether one ends it, and news of it.

What every token needs lies at hand: `take_token` runs once a row of every step. Which results belong to the request is
`engine_core.py`'s decision, what follows from them the scheduler's.
"""

from ..config import EngineConfig
from ..paging.block_hash import next_block
from ..protocol.actions import Chunk
from ..protocol.events import Outcome
from ..protocol.results import StepResult, TokenScores
from ..protocol.submission import Submission, Update
from ..scheduler.request import Request


class LiveRequest:
    """`length` counts the request's tokens, prompt included. `news` was not sent yet; None: there is none."""

    def __init__(self, submission: Submission, request: Request, config: EngineConfig) -> None:
        """`request` is the scheduler's own."""
        facts, payload = submission.facts, submission.payload
        self.submission, self.request = submission, request
        self.length = facts.prompt_len
        self.wants_scores = payload.plan.logprobs is not None or payload.plan.prompt_logprobs is not None
        self.news: Update | None = None
        self._name, self._outputs, self._page_size = facts.id, payload.outputs, config.page_size
        self._stop, self._stop_ids = submission.stop, payload.plan.stop_ids
        self._prompt_scores: list[TokenScores] = []
        self._last_hash = facts.block_hashes[-1] if facts.block_hashes else b""
        hashes_all = len(facts.block_hashes) == facts.prompt_len // config.page_size
        self._feeds_cache = hashes_all and config.prefix_cache and not config.deterministic

    def new_news(self) -> Update:
        """An empty update, for what comes."""
        self.news = Update(self._name)
        return self.news

    def take_prompt_scores(self, row: Chunk, scores: TokenScores | None) -> None:
        """Scores of a chunk of the prompt, to go with the first token."""
        if row.start == 0:
            self._prompt_scores.clear()  # of an earlier run
        if scores is not None:
            self._prompt_scores.append(scores)

    def take_scores(self, result: StepResult, step: int, index: int) -> None:
        """Scores of the token of row `index` that is about to be taken."""
        news = self.news or self.new_news()
        if self.submission.payload.plan.logprobs is not None:
            news.scores.append(result.score_of(step, index))
        news.prompt_scores += self._prompt_scores
        self._prompt_scores.clear()

    def take_token(self, token: int) -> Outcome:
        """The request's next token."""
        self._outputs.append(token)
        self.length += 1
        news = self.news or self.new_news()
        news.token_ids.append(token)
        stopped = (self._stop is not None or token in self._stop_ids) and self._is_stopped(news, token)
        return Outcome(self._name, stopped, None if self.length % self._page_size else self._block_hash())

    def _is_stopped(self, news: Update, token: int) -> bool:
        """Whether the token ends the request; why, where that was not the model's own end."""
        found = None if self._stop is None else self._stop.push(token)
        if token in self._stop_ids:
            news.stop_reason = None if token in self.submission.eos_ids else token
            return True
        news.stop_reason = found
        return found is not None

    def _block_hash(self) -> bytes | None:
        """Of the page that the newest token fills, where the request feeds the prefix cache."""
        if not self._feeds_cache:
            return None
        prompt, size = self.submission.payload.prompt, self._page_size
        tail = [*prompt[self.length - size :].tolist(), *self._outputs[-size:]][-size:]
        self._last_hash = next_block(self._last_hash, tail)
        return self._last_hash
