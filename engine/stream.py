"""One request as its caller sees it: text as it comes, or the whole result. Runs on the caller's thread."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from ..models.tokenizer import Tokenizer
from .core import Update
from .outputs import CompletionOutput, RequestOutput, TextDelta
from .protocol import FinishReason
from .request import Timeline


@dataclass(frozen=True)
class Prompt:
    """A prompt that passed every check: its text where it was given as text, and its token ids."""

    text: str | None
    token_ids: list[int]


def make_output(prompt: Prompt, token_ids: list[int], text: str, timeline: Timeline, last: Update) -> RequestOutput:
    """The result that `last`, a request's final update, completes."""
    completion = CompletionOutput(0, text, token_ids, last.finish_reason)
    return RequestOutput(last.request_id, prompt.text, prompt.token_ids, [completion], timeline, last.error)


def shown(token_ids: list[int], reason: FinishReason | None) -> list[int]:
    """The tokens that become text: all but one that stopped the request."""
    return token_ids[:-1] if reason == "stop" else token_ids


class RequestStream:
    """Iterating gives `TextDelta`s until the request ends; `result()` waits for the whole. For one consumer.

    Leaving the iteration early (`break`, an exception, Ctrl-C) or `close()` aborts the request, and so does dropping an
    iterator: keep the one that `iter` gives for as long as the request is wanted. A stream that is never iterated runs
    to its end.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        timeline: Timeline,
        updates: "SimpleQueue[Update]",
        tokenizer: Tokenizer,
        abort: Callable[[str], None],
    ) -> None:
        """`updates` is the sink the request was submitted with."""
        self.request_id = request_id
        self._prompt, self._timeline, self._updates, self._abort = prompt, timeline, updates, abort
        self._text_stream = tokenizer.stream()
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._last: Update | None = None

    def __iter__(self) -> Iterator[TextDelta]:
        """Deltas from here on."""
        try:
            while self._last is None:
                yield self._next()
        finally:
            self.close()

    def result(self) -> RequestOutput:
        """Wait for the end. An interrupt while waiting aborts the request."""
        for _ in self:
            pass
        assert self._last is not None
        text = "".join(self._text)
        return make_output(self._prompt, self._token_ids, text, self._timeline, self._last)

    def close(self) -> None:
        """Abort unless the request has ended."""
        if self._last is None:
            self._abort(self.request_id)

    def _next(self) -> TextDelta:
        update = self._updates.get()
        if update.finish_reason is not None:
            self._last = update  # first: an interrupt below must not make a later call wait for an update that came
        self._token_ids.extend(update.token_ids)
        text = self._text_stream.push(shown(update.token_ids, update.finish_reason))
        if update.finish_reason is not None:
            text += self._text_stream.finish()
        self._text.append(text)
        return TextDelta(text, update.token_ids, update.finish_reason)
