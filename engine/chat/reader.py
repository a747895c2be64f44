"""Reads one answer into parts, in step with its text: what a stop string cuts off, or holds back, is in no part.

The text is the detokeniser's, of ordinary tokens and, on request, of special ones; the parser is given special tokens
whatever the text holds. Without stop strings tokens go on at once.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from ...models.text.tokenizer import Tokenizer
from .answers import AnswerParser, Parts, Piece, joined


class AnswerReader:
    """The parts of one completion, as its tokens come. Not thread-safe."""

    def __init__(
        self, parser: AnswerParser, tokenizer: Tokenizer, prompt: Sequence[int], *, may_stop: bool, skip_special: bool
    ) -> None:
        """Begin behind `prompt`. `may_stop`: there are stop strings; `skip_special` is as in the text."""
        self._parser, self._tokenizer = parser, tokenizer
        self._stream = tokenizer.stream(False, prompt)
        # What `released` is compared with: the text's own stream, token by token.
        self._shown = tokenizer.stream(skip_special, prompt) if may_stop else None
        self._waiting: deque[tuple[int, int]] = deque()  # tokens, each with where it ends in the text
        self._length = self._released = 0

    def push(self, ids: Sequence[int], text: str) -> Parts:
        """Take tokens, and the text that was given out for them."""
        return self._parser.push(self._pieces(self._let_go(ids, text)))

    def finish(self, ids: Sequence[int], text: str, *, is_cut: bool) -> Parts:
        """Take the last ones. `is_cut`: a stop string ends the text, and what is behind is left out."""
        pieces = list(self._pieces(self._let_go(ids, text)))
        if not is_cut:
            pieces += self._pieces(token for token, _ in self._waiting)
            pieces += self._left()
        elif self._waiting:
            pieces += self._cut(*self._waiting[0])
        return joined((self._parser.push(pieces), self._parser.finish()))

    def _let_go(self, ids: Sequence[int], text: str) -> Sequence[int]:
        """Return the tokens whose text has been given out by now."""
        if self._shown is None:
            return ids
        for token in ids:
            self._length += len(self._shown.push((token,)))
            self._waiting.append((token, self._length))
        self._released += len(text)
        free = []
        while self._waiting and self._waiting[0][1] <= self._released:
            free.append(self._waiting.popleft()[0])
        return free

    def _cut(self, token: int, end: int) -> list[Piece]:
        """Return the piece in which a stop string begins, without what is behind."""
        if token in self._tokenizer.control_ids:
            return self._left()
        (piece,) = self._pieces((token,))
        kept = len(piece.text) - (end - self._released)
        return [Piece(token, piece.text[:kept])] if kept > 0 else []

    def _pieces(self, ids: Iterator[int] | Sequence[int]) -> Iterator[Piece]:
        for token in ids:
            if token in self._tokenizer.control_ids:  # the bytes before it are no part of a character with those behind
                yield from self._left()
            yield Piece(token, self._stream.push((token,)))

    def _left(self) -> list[Piece]:
        text = self._stream.finish()
        return [Piece(-1, text)] if text else []
