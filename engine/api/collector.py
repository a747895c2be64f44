"""From the engine's updates to what a caller sees: tokens gathered, text cut at stop strings, log-probabilities named.

Runs on callers' threads; a collector belongs to one of them at a time. It knows neither queues nor the engine.
"""

from array import array
from typing import Any

from ...models.text.tokenizer import Tokenizer
from ..chat.answers import AnswerFormat, Parts, call_ids
from ..chat.reader import AnswerReader
from ..core.submission import Update
from ..protocol.actions import FinishReason
from ..protocol.cache_report import PrefixCacheReport
from ..protocol.list_view import ListView
from ..protocol.results import HostScores
from ..protocol.timeline import Timeline
from .detokenizer import Detokenizer
from .growing_text import GrowingAnswer, GrowingText
from .logprob_names import LogprobNames
from .outputs import CompletionOutput, CompletionSoFar, LogprobsAt, RequestOutput, make
from .prompts import Prompt
from .sampling_params import RequestOutputKind, SamplingParams


class CompletionCollector:
    """One completion as it grows."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        arrival: float,
        answers: AnswerFormat | None,
        name: str,
    ) -> None:
        """Begin without tokens, behind `prompt`; `arrival` is in seconds on the engine's clock. `answers`: the format
        by which the answer is read into parts; None: it is not. Ids of its calls are made of `name`."""
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._index, self._params, self._tokenizer = index, params, tokenizer
        self._timeline = Timeline(arrival)
        self._token_ids = array("i")  # as an array it costs the garbage collector nothing, however long it is
        self._text = GrowingText()
        self._given = 0, 0  # tokens, and pieces of text, that `new` has given
        self._whole: CompletionOutput | None = None
        self._logprobs: list[LogprobsAt] = []
        self._names = LogprobNames(tokenizer if params.detokenize else None, params.logprob_token_ids)
        self._cumulative = 0.0
        self._stop_reason: int | str | None = None
        self._detokenizer = Detokenizer(
            tokenizer,
            tuple(params.stop or ()),
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
            after=prompt.token_ids,
        )
        self._reader = self._answer = None
        if answers is not None and params.detokenize:
            self._answer = GrowingAnswer()
            self._reader = AnswerReader(
                answers.parser(prompt.token_ids, call_ids(name)),
                tokenizer,
                prompt.token_ids,
                may_stop=bool(params.stop),
                skip_special=params.skip_special_tokens,
            )

    def take(self, update: Update) -> str:
        """Take in an update; return the text that it adds."""
        if update.timeline is not None:
            self._timeline = update.timeline
        if self._params.logprobs is not None:
            self._take_scores(update, self._params.logprobs)
        self._token_ids.extend(update.token_ids)
        text = ""
        if update.finish_reason is not None:
            self.finish_reason, self.error, self._stop_reason = update.finish_reason, update.error, update.stop_reason
            if self._params.detokenize:
                text = self._last_text(update)
        elif self._params.detokenize:
            text = self._detokenizer.push(update.token_ids)
        self._text.add(text)
        if self._reader is not None and self._answer is not None:
            self._answer.add(self._parts(self._reader, update, text))
        return text

    def newest_parts(self) -> Parts | None:
        """Return what the latest update has added to the answer's parts; None: it is not read into parts."""
        answer = self._answer
        return None if answer is None else answer.between(answer.count - 1, answer.count)

    def output(self) -> CompletionOutput:
        """Return the completion so far, which later updates do not change."""
        if self.finish_reason is not None:
            if self._whole is None:
                self._whole = self._make_whole()
            return self._whole
        count = len(self._token_ids)
        has_logprobs = self._params.logprobs is not None
        fields = {
            "index": self._index,
            "_text": (self._text, self._text.count),
            "token_ids": ListView(self._token_ids, count),
            "cumulative_logprob": self._cumulative if has_logprobs else None,
            "logprobs": ListView(self._logprobs, count) if has_logprobs else None,
            "finish_reason": None,
            "stop_reason": None,
            "_stamps": (self._timeline, count),
        }
        if self._answer is not None:
            fields["_answer"] = self._answer, self._answer.count
        return make(CompletionSoFar, fields)

    def new(self) -> CompletionOutput | None:
        """Return what came since this was asked last; None: nothing did."""
        (token, piece), count, pieces = self._given, len(self._token_ids), self._text.count
        if pieces == piece:
            return None
        self._given = count, pieces
        has_logprobs = self._params.logprobs is not None
        fields = {
            "index": self._index,
            "text": self._text.between(piece, pieces),
            "token_ids": self._token_ids[token:].tolist(),
            "cumulative_logprob": self._cumulative if has_logprobs else None,
            "logprobs": self._logprobs[token:] if has_logprobs else None,
            "finish_reason": self.finish_reason,
            "stop_reason": self._stop_reason,
            "_stamps": (self._timeline, count),
        }
        if self._answer is not None:
            fields |= self._answer.between(piece, pieces)._asdict()
        if self.finish_reason is None:
            return make(CompletionSoFar, fields)
        fields["timeline"] = self._timeline.whole()
        return make(CompletionOutput, fields)

    def _make_whole(self) -> CompletionOutput:
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text=self._text.until(self._text.count),
            token_ids=self._token_ids.tolist(),
            cumulative_logprob=self._cumulative if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            timeline=self._timeline.whole(),
            **({} if self._answer is None else self._answer.until(self._answer.count)._asdict()),
        )

    def _last_text(self, update: Update) -> str:
        ids = update.token_ids[:-1] if self._ends_by_token(update) else update.token_ids
        return self._detokenizer.push(ids) + self._detokenizer.finish()

    def _parts(self, reader: AnswerReader, update: Update, text: str) -> Parts:
        if update.finish_reason is None:
            return reader.push(update.token_ids, text)
        ids = update.token_ids
        if self._ends_by_token(update) and ids[-1] not in self._tokenizer.control_ids:
            ids = ids[:-1]
        return reader.finish(ids, text, is_cut=isinstance(update.stop_reason, str))

    def _ends_by_token(self, update: Update) -> bool:
        """Whether the update's last token is left out of the text, because it has ended the completion."""
        ended_by_token = update.finish_reason == "stop" and not isinstance(update.stop_reason, str)
        return ended_by_token and not self._params.include_stop_str_in_output and bool(update.token_ids)

    def _take_scores(self, update: Update, count: int) -> None:
        if not update.token_ids:
            return
        self._logprobs.extend(self._names.named(update.scores, update.token_ids, count))
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
        answers: AnswerFormat | None = None,
        name: str = "",
    ) -> None:
        """Begin without tokens; `arrival` is in seconds on the engine's clock. `answers`: the format by which answers
        are read into parts; None: they are not. Ids of their calls are made of `name`."""
        self.request_id, self.sequence_ids, self.prompt = request_id, sequence_ids, prompt
        # Of the prompt's tokens but the first, in pieces.
        self.prompt_scores: list[HostScores] = []
        self._params, self._tokenizer = params, tokenizer
        self._completions = {
            sequence_id: CompletionCollector(index, prompt, params, tokenizer, arrival, answers, f"{name}:{index}")
            for index, sequence_id in enumerate(sequence_ids)
        }
        self._running = dict.fromkeys(sequence_ids)  # an ordered set
        self._has_ended = False  # one of them
        self._cache: PrefixCacheReport | None = None
        self._prompt_logprobs: list[LogprobsAt | None] | None = None
        # What is the same in every output, which is made for every token.
        self._fields = {
            "request_id": request_id,
            "prompt": prompt.text,
            "prompt_token_ids": prompt.token_ids,
            "prompt_logprobs": None,
            "finished": False,
            "num_cached_tokens": None,
            "cache_report": None,
            "error": None,
        }
        self._has_given_prompt_logprobs = False

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

    def take(self, update: Update) -> str:
        """Take in an update of one completion; return the text that it adds to it."""
        sequence_id = update.request_id
        if update.finish_reason is not None:
            self._has_ended = True
            self._running.pop(sequence_id, None)  # first: an interrupt below must not make anyone wait for more
        if sequence_id == self.sequence_ids[0]:  # the others share its prompt
            self.prompt_scores += update.prompt_scores
            if update.cache is not None:
                self._cache = update.cache
        return self._completions[sequence_id].take(update)

    def newest_parts(self, sequence_id: int) -> Parts | None:
        """Return what a completion's latest update has added to its parts; None: it is not read into parts."""
        return self._completions[sequence_id].newest_parts()

    def output(self) -> RequestOutput:
        """Return the request so far, which later updates do not change."""
        outputs = [completion.output() for completion in self._completions.values()]
        return self._output(outputs, self._name_prompt_logprobs())

    def next_output(self) -> RequestOutput | None:
        """Return the next output of the kind that the request asked for; None: it is not due yet."""
        kind = self._params.output_kind
        if kind is RequestOutputKind.DELTA:
            new = [completion.new() for completion in self._completions.values()]
            outputs = [completion for completion in new if completion is not None]
            return self._delta(outputs) if outputs else None
        return self.output() if kind is RequestOutputKind.CUMULATIVE or self.is_finished else None

    def _delta(self, outputs: list[CompletionOutput]) -> RequestOutput:
        """Make an output of what is new; the prompt's log-probabilities are new once."""
        scores = None if self._has_given_prompt_logprobs else self._name_prompt_logprobs()
        self._has_given_prompt_logprobs = self._has_given_prompt_logprobs or scores is not None
        return self._output(outputs, scores)

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[LogprobsAt | None] | None
    ) -> RequestOutput:
        fields: dict[str, Any] = self._fields.copy()
        fields["outputs"] = outputs
        if self._cache is not None:
            fields["num_cached_tokens"], fields["cache_report"] = self._cache.cached_tokens, self._cache
        if prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs
        if self._has_ended:
            fields["finished"], fields["error"] = not self._running, self.error
        return make(RequestOutput, fields)

    def _name_prompt_logprobs(self) -> list[LogprobsAt | None] | None:
        """Make them once, when all are there: a prompt's are many, and outputs of a running request are made often."""
        count = self._params.prompt_logprobs
        if count is None or self._prompt_logprobs is not None:
            return self._prompt_logprobs
        wanted = self.prompt.token_ids[1:]
        if sum(len(scores.logprob) for scores in self.prompt_scores) >= len(wanted):
            names = LogprobNames(self._tokenizer if self._params.detokenize else None)
            self._prompt_logprobs = [None, *names.named(self.prompt_scores, wanted, count)]
        return self._prompt_logprobs
