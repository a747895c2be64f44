"""Reads answers that mark their parts in the text: a block of reasoning at the beginning, then words and calls.

Reasoning stands between two tags; the prompt may have opened or closed it. Behind it everything is content but calls
that a `CallSyntax` reads: a call is given out as a whole, because what turns out to be none (cut off, another
function, no JSON) is content, as the model wrote it, and what was given out is never taken back. Content goes out at
once, but for what may be the beginning of a marker, and blanks, which belong to the markup if that is what follows.

Reading depends on the text alone, not on how it was cut into tokens. Special tokens that are no markers are in no part.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .answers import NOTHING, Parts, Piece, ToolCall
from .call_syntax import NO_TOOLS, Call, CallSyntax, KnownTools
from .text_cursor import Reading, TextCursor, may_begin

if TYPE_CHECKING:
    from ...models.text.tokenizer import Tokenizer

# Tokens at the end of a prompt in which its last tag is looked for: a tag, and blanks behind it.
_TAIL = 24


@dataclass(frozen=True)
class ReasoningTags:
    """What stands around reasoning."""

    open: str
    close: str

    @property
    def markers(self) -> frozenset[str]:
        """Both, without the blanks at their ends."""
        return frozenset({self.open.strip(), self.close.strip()})


@dataclass(frozen=True)
class TextFormat:
    """How the answers to one request are read; an `AnswerFormat`."""

    tokenizer: "Tokenizer"
    tags: ReasoningTags | None  # None: it has no reasoning apart from the rest
    syntax: CallSyntax | None  # None: no calls are read
    tools: KnownTools = NO_TOOLS
    most_calls: int | None = None  # what comes behind so many is content; None: any number
    always_reasons: bool = False  # an answer begins with reasoning, whether a tag says so or not
    begun: str = ""  # the beginning of the answer, where the prompt has that

    @property
    def marker_ids(self) -> frozenset[int | None]:
        """Ids of those markers that are tokens."""
        markers = {*(self.tags.markers if self.tags else ()), *(self.syntax.markers if self.syntax else ())}
        return frozenset(map(self.tokenizer.backend.token_to_id, markers))

    def parser(self, prompt: Sequence[int], new_id: Callable[[], str]) -> "TextParser":
        """Return what reads an answer to this prompt, which may have opened its reasoning, or closed it."""
        return TextParser(self, self.reasons(self.tail_of(prompt)), new_id)

    def tail_of(self, prompt: Sequence[int]) -> str:
        """Return the end of a prompt as text."""
        return self.tokenizer.decode(list(prompt[-_TAIL:]), skip_special=False)

    def reasons(self, tail: str) -> bool | None:
        """Whether the answer behind a prompt that ends so begins inside of reasoning; None: it may open it itself."""
        if self.tags is None:
            return False
        opening, closing = self.tags.open.strip(), self.tags.close.strip()
        if self.begun:
            opened, closed = self.begun.rfind(opening), self.begun.rfind(closing)
            return opened > closed if max(opened, closed) >= 0 else None
        end = tail.rstrip()
        if end.endswith(closing):
            return False
        return True if self.always_reasons or end.endswith(opening) else None


class TextParser:
    """Reads one answer; an `AnswerParser`."""

    def __init__(self, form: TextFormat, is_reasoning: bool | None, new_id: Callable[[], str]) -> None:
        """`is_reasoning`: whether the answer begins inside of reasoning; None: if it opens it itself."""
        self._form, self._new_id, self._cursor = form, new_id, TextCursor()
        self._left_out = form.tokenizer.control_ids - form.marker_ids
        self._reasoning, self._content, self._calls = list[str](), list[str](), list[ToolCall]()
        self._blanks = ""  # those that the content ends with, not given out yet
        self._said, self._called = False, 0  # whether there is content; calls so far
        self._is_behind_call = False  # with nothing but blanks between
        self._reading = self._read(is_reasoning)
        next(self._reading)

    def push(self, pieces: Iterable[Piece]) -> Parts:
        """Take what comes next; return what is new for certain."""
        text = "".join(piece.text for piece in pieces if piece.token_id not in self._left_out)
        if text and not self._cursor.is_whole:
            self._cursor.feed(text)
            next(self._reading, None)
        return self._new()

    def finish(self) -> Parts:
        """Return what was held back; nothing comes any more."""
        self._cursor.is_whole = True
        next(self._reading, None)
        return self._new()

    def _new(self) -> Parts:
        if not (self._reasoning or self._content or self._calls):
            return NOTHING
        parts = Parts("".join(self._reasoning), "".join(self._content), tuple(self._calls))
        self._reasoning, self._content, self._calls = [], [], []
        return parts

    def _read(self, is_reasoning: bool | None) -> Reading[None]:
        yield
        if self._form.tags is not None and is_reasoning is not False:
            yield from self._read_reasoning(self._form.tags, is_begun=is_reasoning is True)
        yield from self._read_content()

    def _read_reasoning(self, tags: ReasoningTags, *, is_begun: bool) -> Reading[None]:
        """Read the block of reasoning, if there is one, and the line ends around it and what it holds."""
        cursor, start = self._cursor, self._cursor.at
        self._blanks = yield from cursor.blanks()
        if not (yield from cursor.accept(tags.open)):
            if not is_begun:
                return
            cursor.at = start
        self._blanks = ""
        at_start, held = True, ""
        while True:
            end = cursor.text.find(tags.close, cursor.at)
            until = end if end >= 0 else len(cursor.text) - may_begin(cursor.text[cursor.at :], (tags.close,))
            new, cursor.at = cursor.text[cursor.at : until], max(until, cursor.at)
            new = held + (new.lstrip("\n") if at_start and not held else new)
            at_start = at_start and not new
            held = new[len(new.rstrip("\n")) :]
            self._reasoning.append(new[: len(new) - len(held)])
            if end >= 0:
                break
            cursor.forget()
            if not (yield from cursor.more()):
                self._reasoning.append(held + cursor.text)
                cursor.at = len(cursor.text)
                return
        cursor.at += len(tags.close)
        yield from self._line_ends()

    def _line_ends(self) -> Reading[None]:
        while (yield from self._cursor.accept("\n")):
            pass

    def _read_content(self) -> Reading[None]:
        cursor, syntax = self._cursor, self._form.syntax
        if syntax is not None and syntax.is_whole_answer:
            self._blanks += yield from cursor.blanks()
        while syntax is not None and self._called != self._form.most_calls:
            start = yield from self._to_a_start(syntax)
            if not start:
                break
            mark = cursor.at
            calls = yield from syntax.read(cursor, self._form.tools)
            if calls is None or not self._take(calls):
                read = cursor.at if syntax.passes_refused else mark
                cursor.at = max(read, mark + len(start))
                self._say(cursor.text[mark : cursor.at])
            cursor.forget()
        yield from self._say_the_rest()

    def _take(self, calls: Sequence[Call]) -> bool:
        """Give out calls, unless there are more than there may be."""
        most = self._form.most_calls
        if most is not None and self._called + len(calls) > most:
            return False
        self._calls += [ToolCall(self._new_id(), call.name, call.arguments) for call in calls]
        self._called += len(calls)
        self._blanks, self._is_behind_call = "", True
        return True

    def _to_a_start(self, syntax: CallSyntax) -> Reading[str]:
        """Say what is before the next text at which calls may begin, and stand there; "": no more comes."""
        cursor = self._cursor
        if syntax.is_whole_answer:
            if self._said or self._called:
                return ""
            at = cursor.at
            start = yield from cursor.accept(*syntax.starts)
            cursor.at = at
            return start
        wanted = re.compile("|".join(map(re.escape, sorted(syntax.starts, key=len, reverse=True))))
        while (found := wanted.search(cursor.text, cursor.at)) is None:
            until = len(cursor.text) - may_begin(cursor.text[cursor.at :], syntax.starts)
            self._say(cursor.text[cursor.at : until])
            cursor.at = until
            cursor.forget()
            if not (yield from cursor.more()):
                return ""
        self._say(cursor.text[cursor.at : found.start()])
        cursor.at = found.start()
        return found[0]

    def _say_the_rest(self) -> Reading[None]:
        cursor = self._cursor
        while True:
            self._say(cursor.text[cursor.at :])
            cursor.at = len(cursor.text)
            cursor.forget()
            if not (yield from cursor.more()):
                break
        if not self._is_behind_call:
            self._content.append(self._blanks)

    def _say(self, text: str) -> None:
        """Give out content, but for the blanks that it ends with."""
        words = (self._blanks + text).rstrip() if self._form.syntax is not None else self._blanks + text
        self._blanks = (self._blanks + text)[len(words) :]
        if words and not self._said and self._called:
            words = words.lstrip()
        if words:
            self._said, self._is_behind_call = True, False
        self._content.append(words)
