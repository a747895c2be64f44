"""A text that comes in pieces, read as if it were there already.

Readers are generators: where the text ends for now they yield, and go on when there is more of it. What they find
depends on the whole text alone, never on where it was cut into pieces: each method waits until what follows cannot
change its answer. It does not know what is read.
"""

import re
from collections.abc import Generator, Iterable

# A reader: it yields where it needs more text, and returns what it has found.
type Reading[T] = Generator[None, None, T]

_INSIDE = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_NAME = re.compile(r"[\w.\-]+")
_NO_BLANK = re.compile(r"\S")


class TextCursor:
    """A place in a text that grows."""

    def __init__(self) -> None:
        self.text, self.at = "", 0  # what is there; what is before the place has been read
        self.is_whole = False  # nothing more comes

    def feed(self, more: str) -> None:
        """Append what has come."""
        self.text += more

    def forget(self) -> None:
        """Drop what is before the place. Only where no reader remembers places."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Reading[bool]:
        """Wait for more text; False: there is none."""
        length = len(self.text)
        while len(self.text) == length:
            if self.is_whole:
                return False
            yield
        return True

    def at_end(self) -> Reading[bool]:
        """Whether the text ends at the place."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return True
        return False

    def peek(self) -> Reading[str]:
        """Return the next character; "": there is none."""
        return "" if (yield from self.at_end()) else self.text[self.at]

    def blanks(self) -> Reading[str]:
        """Pass blanks, and return them."""
        start = pos = self.at
        while (found := _NO_BLANK.search(self.text, pos)) is None:
            pos = len(self.text)
            if not (yield from self.more()):
                break
        self.at = pos if found is None else found.start()
        return self.text[start : self.at]

    def accept(self, *wanted: str) -> Reading[str]:
        """Pass the first of these texts that follows, and return it; "": none does."""
        for text in wanted:
            while self._may_follow(text):
                if self.text.startswith(text, self.at):
                    self.at += len(text)
                    return text
                if not (yield from self.more()):
                    break
        return ""

    def accept_or_end(self, wanted: str) -> Reading[bool]:
        """Pass this text, or what there is of it where all ends."""
        if (yield from self.accept(wanted)):
            return True
        is_cut = self._may_follow(wanted)
        if is_cut:
            self.at = len(self.text)
        return is_cut

    def _may_follow(self, wanted: str) -> bool:
        return wanted.startswith(self.text[self.at : self.at + len(wanted)])

    def name(self) -> Reading[str]:
        """Pass the name of a function or of an argument, and return it; "": there is none."""
        start = pos = self.at
        while True:
            found = _NAME.match(self.text, pos)
            pos = pos if found is None else found.end()
            if pos < len(self.text) or not (yield from self.more()):
                break
        self.at = pos
        return self.text[start:pos]

    def until(self, end: str) -> Reading[str | None]:
        """Pass what is before `end`, and `end`, and return what is before it; None: `end` does not come."""
        start = pos = self.at
        while (found := self.text.find(end, pos)) < 0:
            pos = max(start, len(self.text) - len(end) + 1)
            if not (yield from self.more()):
                return None
        self.at = found + len(end)
        return self.text[start:found]

    def brackets(self) -> Reading[str | None]:
        """Pass what is between an opening bracket of JSON, which stands here, and the one that closes it, and return
        all of it; None: it does not end."""
        start = pos = self.at
        depth, is_inside = 0, False
        while True:
            found = (_INSIDE if is_inside else _OUTSIDE).search(self.text, pos)
            if found is None:
                pos = max(pos, len(self.text))
                if not (yield from self.more()):
                    return None
                continue
            pos = found.end()
            if found[0] == "\\":
                pos += 1  # past what it escapes, which may not be there yet
            elif found[0] == '"':
                is_inside = not is_inside
            else:
                depth += 1 if found[0] in "{[" else -1
                if depth == 0:
                    self.at = pos
                    return self.text[start:pos]


def may_begin(text: str, markers: Iterable[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of one of the markers."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
