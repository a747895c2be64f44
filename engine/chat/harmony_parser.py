"""Reads answers in OpenAI's harmony format, token by token.

A message is a header, `<|start|>AUTHOR to=RECIPIENT<|channel|>CHANNEL <|constrain|>TYPE`, then `<|message|>`, its
content and one of `<|end|>`, `<|return|>`, `<|call|>`. Where parts of a header stand varies in what the model writes,
as in what the reference renders. Content with a recipient is a call of a tool, in the channel "analysis" it is
reasoning, all else is said. Markers count by their ids, so that the same characters in a text are text.

openai-harmony 0.0.8 has a parser too. It is not used, because it raises on what a model may write (text behind a
message, words in a header, an end inside a header) and takes markers inside a content for text; the tests compare the
two on what both read.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from ...models.text.harmony_tokens import HarmonyTokens
from ...models.text.tokenizer import Tokenizer
from .answers import NOTHING, Parts, Piece, ToolCall, joined

type Place = Literal["author", "channel", "constrain"]

_CHANNELS = ("analysis", "commentary", "final")
_TYPES = ("json", "code")
_AUTHORS = ("assistant", "user", "system", "developer", "tool")
_RECIPIENT = r"(?:\s*to=(?P<to>\S*))?"
# What may stand behind <|start|>, <|channel|> and <|constrain|>; each matches, if only nothing.
_GRAMMAR: dict[Place, re.Pattern[str]] = {
    "author": re.compile(rf"\s*(?P<author>(?:{'|'.join(_AUTHORS)}|functions\.\S+?)(?=\s|\Z))?{_RECIPIENT}"),
    "channel": re.compile(rf"\s*(?P<channel>(?!to=)\S+)?{_RECIPIENT}\s*(?P<type>\S+)?"),
    "constrain": re.compile(r"\s*(?P<type>\S+)?"),
}
_FUNCTIONS = "functions."


class _Header(NamedTuple):
    """What a header says, and what stands in it although it is no header."""

    author: str = ""
    channel: str = ""
    recipient: str = ""
    astray: str = ""


class HarmonyFormat:
    """The format of answers of models with a harmony vocabulary."""

    def __init__(self, tokenizer: Tokenizer, markers: HarmonyTokens, most_calls: int | None = None) -> None:
        """`most_calls`: what is called behind so many is content; None: any number of calls."""
        self._tokenizer, self._markers, self._most_calls = tokenizer, markers, most_calls

    def parser(self, prompt: Sequence[int], new_id: Callable[[], str]) -> "HarmonyParser":
        """Return what reads an answer to this prompt: from its last marker of a start on, it is the answer's."""
        last = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == self._markers.start), len(prompt))
        begun = [Piece(token, self._tokenizer.decode_token(token)) for token in prompt[last:]]
        return HarmonyParser(self._markers, self._tokenizer.control_ids, begun, new_id, most_calls=self._most_calls)


class HarmonyParser:
    """Reads one answer; an `AnswerParser`."""

    def __init__(
        self,
        markers: HarmonyTokens,
        control_ids: frozenset[int],
        begun: Iterable[Piece],
        new_id: Callable[[], str],
        *,
        most_calls: int | None = None,
    ) -> None:
        """Begin behind what is `begun`, the end of the prompt. `control_ids` are of tokens that are in no text; calls
        behind `most_calls` are content; None: any number of calls."""
        self._markers, self._control, self._new_id = markers, control_ids, new_id
        self._places: dict[int, Place] = {
            markers.start: "author",
            markers.channel: "channel",
            markers.constrain: "constrain",
        }
        self._known, self._header = _Header(), list[tuple[Place, str]]()
        self._called, self._most_calls = 0, most_calls
        self._call: ToolCall | None = None  # the one whose arguments come
        self._kind: Literal["reasoning", "content", "call"] | None = None  # of what comes; None: a header does
        self._breaks: set[str] = set()  # kinds that have text, before which a message of theirs begins a line
        self._is_new = False  # the message has no text yet
        self.push(begun)
        if self._kind is None:
            self._known, self._header = self._read(is_whole=True), []
        self._breaks.clear()
        self._is_new = False

    def push(self, pieces: Iterable[Piece]) -> Parts:
        """Take what comes next; return what is new. A header is held back until its content begins."""
        new = [part for piece in pieces if (part := self._take(piece)) is not NOTHING]
        return new[0] if len(new) == 1 else joined(new)

    def finish(self) -> Parts:
        """Return what was held back in a header without content, unless it is one that was cut off."""
        return self._abandon(is_end=True) if self._kind is None else NOTHING

    def _take(self, piece: Piece) -> Parts:
        token, markers = piece.token_id, self._markers
        if token in self._places:
            return self._open(self._places[token])
        if token == markers.message:
            return self._begin() if self._kind is None else NOTHING
        if token in (markers.end, markers.return_, markers.call):
            return self._close()
        if token in self._control:
            return NOTHING
        return self._text(piece.text)

    def _open(self, place: Place) -> Parts:
        """Begin a part of a header. One without content that a new start breaks off is given up."""
        if self._kind is not None and place == "constrain":
            return NOTHING
        lost = NOTHING
        if place == "author" or self._kind is not None:
            lost = self._close()
        self._header.append((place, ""))
        return lost

    def _close(self) -> Parts:
        """End a message, or a header without content."""
        lost = self._abandon(is_end=False) if self._kind is None else NOTHING
        self._kind, self._call, self._known, self._header = None, None, _Header(), []
        return lost

    def _begin(self) -> Parts:
        """Begin a content: the header says of which kind."""
        header, self._header = self._read(is_whole=True), []
        lost = self._said(header.astray)
        name = header.recipient.removeprefix(_FUNCTIONS)
        self._is_new = True
        is_call = name and name != "all" and header.author in ("", "assistant")
        if is_call and self._called != self._most_calls:
            self._call, self._kind, self._called = ToolCall(self._new_id(), name, ""), "call", self._called + 1
            return joined((lost, Parts(tool_calls=(self._call,))))
        self._kind = "reasoning" if header.channel == "analysis" and not is_call else "content"
        return lost

    def _text(self, text: str) -> Parts:
        if not text:
            return NOTHING
        if self._kind is None:
            place, before = self._header.pop() if self._header else ("author", "")
            self._header.append((place, before + text))
            return NOTHING
        if self._call is not None:
            return Parts(tool_calls=(ToolCall(self._call.id, self._call.name, text),))
        return self._add(self._kind, text)

    def _add(self, kind: str, text: str) -> Parts:
        """Give out text. Messages of one kind follow each other on lines of their own, as in vLLM."""
        if self._is_new and kind in self._breaks:
            text = "\n" + text
        self._is_new = False
        self._breaks.add(kind)
        return Parts(reasoning=text) if kind == "reasoning" else Parts(content=text)

    def _said(self, text: str) -> Parts:
        if not text:
            return NOTHING
        self._is_new = True
        return self._add("content", text)

    def _abandon(self, *, is_end: bool) -> Parts:
        """Give out what stands in a header that no content follows, as far as it is no header."""
        header, self._header = self._read(is_whole=False, is_cut=is_end), []
        return self._said(header.astray)

    def _read(self, *, is_whole: bool, is_cut: bool = False) -> _Header:
        """Read the header. `is_whole`: content follows it; `is_cut`: the answer ends in it."""
        known, astray = dict(self._known._asdict()), []
        for place, text in self._header:
            said, rest = _read_part(place, text, known["author"], is_whole=is_whole, is_cut=is_cut)
            known |= said
            astray.append(rest)
        known["astray"] = "".join(astray)
        return _Header(**known)


def _read_part(place: Place, text: str, author: str, *, is_whole: bool, is_cut: bool) -> tuple[dict[str, str], str]:
    """Read what stands in one place of a header: what it says, and the text that is no header.

    Where it is unclear which of the two it is, it is text: an answer without any marker is all text.
    """
    found = _GRAMMAR[place].match(text)
    assert found is not None  # they match nothing, too
    groups, end, rest = found.groupdict(), 0, text[found.end() :].strip()
    said: dict[str, str] = {}
    name = groups.get(place)
    is_name = bool(name) and _is_name(place, name or "", author, is_whole=is_whole and not rest, is_cut=is_cut)
    if is_name or not name:
        said, end = {place: name} if name else {}, max(found.end(place), 0) if place in groups else 0
        if groups.get("to") and (is_whole or is_cut):
            said["recipient"], end = groups["to"], found.end("to")
        if groups.get("type") and not rest and _is_type(place, groups["type"], is_whole=is_whole, is_cut=is_cut):
            end = found.end("type")
    return said, text[end:] if text[end:].strip() else ""


def _is_name(place: Place, name: str, author: str, *, is_whole: bool, is_cut: bool) -> bool:
    """Whether a word is the name of an author, who may be known, or of a channel."""
    if place == "author":
        return not author or (is_whole and name == author)
    return is_whole or name in _CHANNELS or (is_cut and any(channel.startswith(name) for channel in _CHANNELS))


def _is_type(place: Place, name: str, *, is_whole: bool, is_cut: bool) -> bool:
    return is_whole or place == "constrain" or (is_cut and name in _TYPES)
