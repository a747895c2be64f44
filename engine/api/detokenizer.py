"""Token ids to text as they come, up to a stop string.

Invariants: text that was given out is never taken back, so the end that may be the start of a stop string waits until
it is known to be none; the pieces joined are the text of all tokens, cut at the first stop string. The code
that gives out text and the code that ends a request run the same search, so they agree. Memory and time per
token are bounded by the longest stop string.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...models.text.tokenizer import Tokenizer


class Match(NamedTuple):
    """A stop string in the text so far: characters from its start, and from its end, to the end of the text."""

    stop: str
    from_start: int
    from_end: int


class StopSearch:
    """A search for stop strings in one sequence, token by token; a `StopCheck`. Not thread-safe.

    As in vLLM a stop string counts where it ends after the text of the first `min_tokens` tokens. Of several, the one
    that ends first counts, and of those that end together the one that is listed first.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, min_tokens: int, skip_special: bool) -> None:
        """Search for `stops`, one or more, none empty. `skip_special` leaves special tokens out of the text."""
        self._stops, self._min_tokens, self._count = tuple(stops), min_tokens, 0
        self._stream = tokenizer.stream(skip_special)
        self._reach = max(map(len, self._stops)) - 1
        self.tail = ""

    def push(self, token_id: int) -> str | None:
        """Take the next token; return the stop string that it completes, if any."""
        _, match = self.advance(token_id)
        return match.stop if match else None

    def advance(self, token_id: int) -> tuple[str, Match | None]:
        """Take the next token; return the text that it completes, and where a stop string is in the text so far."""
        self._count += 1
        new = self._stream.push((token_id,))
        text = self.tail + new
        match = self._find(text, len(new)) if new and self._count > self._min_tokens else None
        self.tail = text[max(0, len(text) - self._reach) :]
        return new, match

    def finish(self) -> str:
        """Return what is left of an unfinished character; it is not searched."""
        return self._stream.finish()

    def held_back(self, text: str) -> int:
        """Count the characters at the end of `text` that may be the start of a stop string."""
        for length in range(min(self._reach, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _find(self, text: str, new: int) -> Match | None:
        """Find the stop string that ends first among the last `new` characters."""
        best, best_end = None, len(text) + 1
        for stop in self._stops:
            start = text.find(stop, max(0, len(text) - new - len(stop) + 1))
            if start >= 0 and (end := start + len(stop)) < best_end:
                best, best_end = Match(stop, len(text) - start, len(text) - end), end
        return best


class Detokenizer:
    """The text of one sequence, piece by piece. Not thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        """Begin a text. `include_stop` cuts behind a stop string, not before it; the rest is as in `StopSearch`."""
        self._include_stop, self._held, self._is_stopped = include_stop, "", False
        self._stream = tokenizer.stream(skip_special)
        self._search = StopSearch(tokenizer, stops, min_tokens=min_tokens, skip_special=skip_special) if stops else None

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` add, as far as it is certain to stay. After a stop string nothing is added."""
        if self._search is None:
            return self._stream.push(ids)
        return "".join(self._push_one(self._search, i) for i in ids)

    def finish(self) -> str:
        """Return the text held back: the start of a stop string that did not come, or U+FFFD for half a character."""
        if self._search is None:
            return self._stream.finish()
        return "" if self._is_stopped else self._held + self._search.finish()

    def _push_one(self, search: StopSearch, token_id: int) -> str:
        if self._is_stopped:
            return ""
        new, match = search.advance(token_id)
        text = self._held + new
        if match is not None:
            self._is_stopped = True
            return text[: len(text) - (match.from_end if self._include_stop else match.from_start)]
        keep = 0 if self._include_stop else search.held_back(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
