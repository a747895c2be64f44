"""Where in an answer its grammar begins: at once, or behind a text that ends what is free, such as "</think>".

The text is looked for in bytes, whatever tokens spell it, control tokens written out. It may stand at the end of the
prompt already, with nothing but blanks behind it: some chat templates write an empty block of reasoning themselves.
Behind it a token may end in blanks and in nothing else, so that all that follows is the grammar's.
"""

import re
from collections.abc import Sequence

import numpy as np

_TAIL = 256  # bytes in which the end of what is free is looked for
PROMPT_TAIL = 64  # tokens of a prompt that are looked at


class Opening:
    """The end of what is free in answers over one vocabulary. A pattern of bytes whose last byte is a literal."""

    def __init__(self, pattern: bytes, pieces: Sequence[bytes]) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        last = pattern[-1:]
        # Tokens that hold the last byte and go on with more than blanks: some of them may not end what is free.
        self._through = [(token, piece) for token, piece in enumerate(pieces) if _goes_on(piece, last)]

    def stands_at_end(self, text: bytes) -> bool:
        """Return whether the text ends what is free, with at most blanks behind."""
        tail = text[-_TAIL:]
        ends = [found.end() for found in self._pattern.finditer(tail)]
        return bool(ends) and not tail[ends[-1] :].strip()

    def forbidden(self, tail: bytes) -> np.ndarray:
        """List the tokens that would end what is free behind `tail` and go on with more than blanks."""
        return np.array([token for token, piece in self._through if self._is_wrong(tail + piece)], np.int64)

    def _is_wrong(self, text: bytes) -> bool:
        found = self._pattern.search(text)
        return found is not None and bool(text[found.end() :].strip())


def shortened(tail: bytes) -> bytes:
    """Keep as much of what is free as its end is looked for in."""
    return tail[-_TAIL:]


def _goes_on(piece: bytes, last: bytes) -> bool:
    before, _, rest = piece.partition(last)
    return len(before) < len(piece) and bool(rest.strip())
