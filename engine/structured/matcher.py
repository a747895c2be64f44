"""Follows one answer through its grammar, token by token: which tokens may come next, and whether it may end.

It is fed every token that the answer gets, once and in order, and never goes back: an answer that is preempted, moved
or started over on another mesh keeps its tokens, and with them its place in the grammar. Not thread-safe.

Invariant: tokens that end an answer are allowed exactly where the grammar may end.
"""

from typing import Any

import numpy as np

from .opening import Opening, shortened
from .vocabulary import Vocabulary, bits


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, opening: Opening | None, before: bytes = b"") -> None:
        """`matcher` is llguidance's, at the beginning; `before` is the prompt's text, of which the end is enough."""
        self._vocabulary, self._matcher = vocabulary, matcher
        self._opening = None if opening is None or opening.stands_at_end(before) else opening
        self._free = b""  # the end of what is free, while it lasts

    @property
    def failure(self) -> str | None:
        """Say why the grammar can no longer be followed, in a sentence; None: it can."""
        if not self._matcher.is_error():
            return None
        reason = " ".join(str(self._matcher.get_error()).split())[:200]
        return f"the grammar of structured_outputs could not be followed further ({reason}): simplify it."

    @property
    def is_over(self) -> bool:
        """Return whether nothing but the end may come."""
        return self._opening is None and bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Return whether the answer may end here."""
        return self._opening is None and bool(self._matcher.is_accepting())

    def push(self, token: int) -> None:
        """Take the next token of the answer; one that ends it is taken no notice of."""
        if self._opening is None:
            if token not in self._vocabulary.ends and not self._matcher.is_stopped():
                self._matcher.consume_token(token)
            return
        self._free = shortened(self._free + self._vocabulary.text_of((token,)))
        if self._opening.stands_at_end(self._free):
            self._opening = None

    def fill(self, mask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and of no others.

        Args:
            mask: [words] int32 without gaps; token t is bit t % 32 of word t // 32.
        """
        vocabulary = self._vocabulary
        if self._opening is None:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        else:
            mask[:] = -1
            mask &= ~bits(self._opening.forbidden(self._free), len(mask))
        mask &= vocabulary.inner
        if self.may_end:
            mask |= vocabulary.end_bits

    @property
    def words(self) -> int:
        """Return the length of a mask."""
        return self._vocabulary.words

    def admits_something(self) -> bool:
        """Return whether anything may come now, the end included."""
        mask = np.empty(self.words, np.int32)
        self.fill(mask)
        return self.failure is None and bool(mask.any())
