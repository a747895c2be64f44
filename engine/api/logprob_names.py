"""From scores on the host to log-probabilities by token, with each token's text. No JAX here.

As in vLLM a token that ends inside of a character has no text, "", and the one that completes it has the whole
character, so that the texts of the tokens that were taken, joined, are the text.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from ...models.text.tokenizer import Tokenizer
from ..protocol.results import HostScores
from .outputs import Logprob, LogprobsAt


class LogprobNames:
    """The names of one sequence's tokens as they come."""

    def __init__(self, tokenizer: Tokenizer | None, only: Sequence[int] | None = None) -> None:
        """Name tokens by `tokenizer`, None: they get no text. Of the most likely ones, `only` these; None: all."""
        self._tokenizer, self._only = tokenizer, None if only is None else frozenset(only)
        self._begun = b""  # the character that the tokens so far have begun and not ended

    def named(self, pieces: Iterable[HostScores], token_ids: Iterable[int], count: int) -> Iterator[LogprobsAt]:
        """Yield one dict per token: the token itself, then the `count` most likely ones, -1: all there are."""
        most = None if count == -1 else count
        rows = chain.from_iterable(
            zip(
                scores.logprob.tolist(),
                scores.rank.tolist(),
                scores.top_ids[:, :most].tolist(),
                scores.top_logprobs[:, :most].tolist(),
                strict=True,
            )
            for scores in pieces
        )
        for token, (logprob, rank, top_ids, top_logprobs) in zip(token_ids, rows, strict=True):
            at = {token: Logprob(logprob, rank, self._text(token))}
            for top_rank, (top, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
                if self._only is None or top in self._only:
                    at.setdefault(top, Logprob(value, top_rank, self._text(top)))
            if self._tokenizer is not None:
                self._begun = _unfinished(self._begun + self._tokenizer.piece(token))
            yield at

    def _text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        piece = self._tokenizer.piece(token)
        try:
            piece.decode()
        except UnicodeDecodeError:
            whole = (self._begun + piece).decode(errors="replace")
            return "" if whole.endswith("\N{REPLACEMENT CHARACTER}") else whole
        return self._tokenizer.decode_token(token)


def _unfinished(data: bytes) -> bytes:
    """Return the bytes at the end that begin a character in UTF-8 and do not end it."""
    for length, byte in enumerate(reversed(data[-3:]), start=1):
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[-length:] if length < needed else b""
    return b""
