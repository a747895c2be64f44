"""From the engine's updates to what a caller sees: tokens gathered, text cut at stop strings, log-probabilities named.

Runs on callers' threads; a collector belongs to one of them at a time. It knows neither queues nor the engine.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from ...models.text.tokenizer import Tokenizer
from ..core.submission import Update
from ..protocol.actions import FinishReason
from ..protocol.results import HostScores
from ..protocol.timeline import Timeline
from .detokenizer import Detokenizer
from .outputs import CompletionOutput, Logprob, LogprobsAt, RequestOutput, TextDelta
from .prompts import Prompt
from .sampling_params import SamplingParams


class CompletionCollector:
    """One completion as it grows."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer, arrival: float) -> None:
        """Begin without tokens; `arrival` is in seconds on the engine's clock."""
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._index, self._params, self._tokenizer = index, params, tokenizer
        self._timeline = Timeline(arrival)
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[LogprobsAt] = []
        self._cumulative = 0.0
        self._stop_reason: int | str | None = None
        self._detokenizer = Detokenizer(
            tokenizer,
            tuple(params.stop or ()),
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
        )

    def take(self, update: Update) -> str:
        """Take in an update; return the text that it adds."""
        self._timeline = update.timeline or self._timeline
        self._take_scores(update)
        self._token_ids.extend(update.token_ids)
        self.finish_reason, self.error = update.finish_reason, update.error
        self._stop_reason = update.stop_reason
        text = self._new_text(update) if self._params.detokenize else ""
        self._pieces.append(text)
        return text

    def output(self) -> CompletionOutput:
        """Return the completion so far; later updates change nothing in it but the timeline."""
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text="".join(self._pieces),
            token_ids=self._token_ids.copy(),
            cumulative_logprob=self._cumulative if has_logprobs else None,
            logprobs=self._logprobs.copy() if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            timeline=self._timeline,
        )

    def _new_text(self, update: Update) -> str:
        ids, is_over = update.token_ids, update.finish_reason is not None
        ended_by_token = update.finish_reason == "stop" and not isinstance(update.stop_reason, str)
        if ended_by_token and not self._params.include_stop_str_in_output:
            ids = ids[:-1]
        text = self._detokenizer.push(ids)
        return text + self._detokenizer.finish() if is_over else text

    def _take_scores(self, update: Update) -> None:
        count = self._params.logprobs
        if count is None or not update.token_ids:
            return
        decode = self._tokenizer if self._params.detokenize else None
        self._logprobs.extend(_name_logprobs(update.scores, update.token_ids, count, decode))
        self._cumulative += sum(float(scores.logprob.sum(dtype="float64")) for scores in update.scores)


class RequestCollector:
    """One request, of one completion or several, as it grows.

    `request_id` is the caller's name for it, `sequence_ids` are the engine's ids of its completions.
    """

    def __init__(
        self,
        request_id: str,
        sequence_ids: tuple[int, ...],
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        arrival: float,
    ) -> None:
        """Begin without tokens; `arrival` is in seconds on the engine's clock."""
        self.request_id, self.sequence_ids, self.prompt = request_id, sequence_ids, prompt
        # Of the prompt's tokens but the first, in pieces.
        self.prompt_scores: list[HostScores] = []
        self._params, self._tokenizer = params, tokenizer
        self._completions = {
            sequence_id: CompletionCollector(index, params, tokenizer, arrival)
            for index, sequence_id in enumerate(sequence_ids)
        }
        self._running = dict.fromkeys(sequence_ids)  # an ordered set
        self._cached_tokens: int | None = None
        self._prompt_logprobs: list[LogprobsAt | None] | None = None

    @property
    def running(self) -> tuple[int, ...]:
        """Return the ids of the completions whose end has not been taken in, in order."""
        return tuple(self._running)

    @property
    def is_finished(self) -> bool:
        """Return whether every completion has ended."""
        return not self._running

    @property
    def error(self) -> str | None:
        """Return why the first failed completion failed; None if none has failed."""
        return next((c.error for c in self._completions.values() if c.error is not None), None)

    def take(self, update: Update) -> TextDelta:
        """Take in an update of one completion; return what it adds to it."""
        sequence_id = update.request_id
        if update.finish_reason is not None:
            self._running.pop(sequence_id, None)  # first: after an interrupt below, no caller may wait for more
        index = self.sequence_ids.index(sequence_id)
        if index == 0:  # the others share its prompt
            self.prompt_scores.extend(update.prompt_scores)
            if update.cached_tokens is not None:
                self._cached_tokens = update.cached_tokens
        text = self._completions[sequence_id].take(update)
        return TextDelta(text, update.token_ids, update.finish_reason, index)

    def output(self) -> RequestOutput:
        """Return the request so far; later updates change nothing in it but the timelines."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            prompt_logprobs=self._name_prompt_logprobs(),
            outputs=[completion.output() for completion in self._completions.values()],
            finished=self.is_finished,
            num_cached_tokens=self._cached_tokens,
            error=self.error,
        )

    def _name_prompt_logprobs(self) -> list[LogprobsAt | None] | None:
        """Return the prompt's log-probabilities; None until all of them are there.

        They are made once: a prompt has many, and outputs of a running request are made often.
        """
        count, wanted = self._params.prompt_logprobs, self.prompt.token_ids[1:]
        if count is None or sum(len(scores.logprob) for scores in self.prompt_scores) < len(wanted):
            return None
        if self._prompt_logprobs is None:
            decode = self._tokenizer if self._params.detokenize else None
            self._prompt_logprobs = [None, *_name_logprobs(self.prompt_scores, wanted, count, decode)]
        return self._prompt_logprobs


def _name_logprobs(
    pieces: Iterable[HostScores], token_ids: list[int], count: int, tokenizer: Tokenizer | None
) -> Iterator[LogprobsAt]:
    """Yield one dict per token: the token itself, then the `count` most likely ones."""
    rows = chain.from_iterable(
        zip(
            scores.logprob.tolist(),
            scores.rank.tolist(),
            scores.top_ids[:, :count].tolist(),
            scores.top_logprobs[:, :count].tolist(),
            strict=True,
        )
        for scores in pieces
    )
    for token, (logprob, rank, top_ids, top_logprobs) in zip(token_ids, rows, strict=True):
        at = {token: Logprob(logprob, rank, _decode(token, tokenizer))}
        for top_rank, (top, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
            at.setdefault(top, Logprob(value, top_rank, _decode(top, tokenizer)))
        yield at


def _decode(token: int, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.decode((token,), skip_special=False)
