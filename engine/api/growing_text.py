"""Texts and answers that come in pieces, and what they were after each of them. No JAX here."""

from array import array

from ..chat.answers import Parts, joined


class GrowingText:
    """Text that comes in pieces, and what it was after each of them; `count` pieces so far.

    It stands in buffers, not in a list: the garbage collector would walk that, a million pieces for 256 long answers.
    """

    __slots__ = ("_ends", "_joined", "_utf8")

    def __init__(self) -> None:
        self._utf8 = bytearray()
        self._ends = array("q", [0])  # where each piece ends, in bytes, behind the start of the first
        self._joined = 0, ""  # the last that was asked for: pieces, and those joined

    @property
    def count(self) -> int:
        """Pieces so far."""
        return len(self._ends) - 1

    def add(self, piece: str) -> None:
        """Take the next piece."""
        self._utf8 += piece.encode()
        self._ends.append(len(self._utf8))

    def between(self, start: int, stop: int) -> str:
        """Join the pieces `start` to `stop` - 1."""
        return self._utf8[self._ends[start] : self._ends[stop]].decode()

    def until(self, count: int) -> str:
        """Join the first `count` pieces: what was joined before is not looked at again."""
        known, text = self._joined
        if count < known:
            return self.between(0, count)
        text += self.between(known, count)
        self._joined = count, text
        return text


class GrowingAnswer:
    """The parts of an answer as they grow; `count` pieces so far, each with something of any of the parts."""

    __slots__ = ("_calls", "_content", "_reasoning")

    def __init__(self) -> None:
        self._reasoning, self._content = GrowingText(), GrowingText()
        self._calls: list[tuple[int, Parts]] = []  # those pieces that have a part of a call, with their numbers

    @property
    def count(self) -> int:
        """Pieces so far."""
        return self._content.count

    def add(self, piece: Parts) -> None:
        """Take the next piece."""
        if piece.tool_calls:
            self._calls.append((self.count, Parts(tool_calls=piece.tool_calls)))
        self._reasoning.add(piece.reasoning)
        self._content.add(piece.content)

    def between(self, start: int, stop: int) -> Parts:
        """Put the pieces `start` to `stop` - 1 together."""
        calls = self._calls_of(start, stop)
        return Parts(self._reasoning.between(start, stop), self._content.between(start, stop), calls.tool_calls)

    def until(self, count: int) -> Parts:
        """Put the first `count` pieces together."""
        calls = self._calls_of(0, count)
        return Parts(self._reasoning.until(count), self._content.until(count), calls.tool_calls)

    def _calls_of(self, start: int, stop: int) -> Parts:
        return joined(piece for number, piece in self._calls if start <= number < stop)
