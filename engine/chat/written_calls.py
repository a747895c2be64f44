"""What a chat template writes around the calls of tools: found by rendering one call, and two.

A name and an argument that no template has are given to it; what stands around them in the result is its own, up to
where what reads calls stops.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...models.errors import ChatTemplateError
from ...models.text.chat import ChatTemplate
from .call_syntax import CallSyntax, KnownTools
from .text_cursor import TextCursor

type Kind = Literal["json", "tags", "gemma", "python"]
"""How a form writes arguments."""

NAME = "find_glacier"
ARGUMENTS: Mapping[str, Any] = {"valley": "Jostedal"}
_SECOND = "find_fjord"
# Mistral's templates want nine letters and digits.
# What stands for an id that a model makes up.
ID = "glacier01"
_IDS = (ID, "fjord0001")
_ASKED: Mapping[str, Any] = {"role": "user", "content": "Where is it?"}
_ARGUMENTS: Mapping[Kind, str] = {
    "json": r'\{(?P<blank>\s*)"valley":(?P<key>\s*)"Jostedal"\s*\}',
    "tags": r"<parameter=valley>\nJostedal\n</parameter>\n",
    "gemma": r"valley:(?P<quote>\S+?)Jostedal(?P=quote)",
    "python": r"valley=([\"'])Jostedal\1",
}


@dataclass(frozen=True)
class WrittenCall:
    """What a template writes around calls."""

    kind: Kind
    before: str  # up to the function's name
    middle: str  # between the name and the arguments
    after: str  # behind the arguments
    between: str | None  # from the arguments of one call to the name of the next; None: it writes one call
    separators: tuple[str, str] | None = None  # of JSON, behind an item and a key; None: any blanks
    quote: str = ""  # Gemma's, around texts


def written_call(template: ChatTemplate, chat_template: str | None) -> str | None:
    """Return what the template writes for a call behind the words of a user's turn; None: it cannot be rendered."""
    return _written(template, chat_template, (NAME,))


def around_calls(template: ChatTemplate, chat_template: str | None, syntax: CallSyntax) -> WrittenCall | None:
    """Find what the template writes around calls of this form; None: it cannot be told."""
    block = _block(written_call(template, chat_template) or "", syntax)
    found_kinds = ((kind, re.search(pattern, block)) for kind, pattern in _ARGUMENTS.items())
    kind, found = next(((k, f) for k, f in found_kinds if f is not None), (None, None))
    if kind is None or found is None or NAME not in block[: found.start()]:
        return None
    before, _, middle = block[: found.start()].partition(NAME)
    one = f"{before}{NAME}{middle}{found[0]}"
    both = (_written(template, chat_template, (NAME, _SECOND)) or "").partition(one)[2]
    between = both.partition(_SECOND)[0] if f"{_SECOND}{middle}{found[0]}" in both else None
    groups = found.groupdict()
    separators = (", ", ": ") if groups.get("key") == " " else (",", ":")
    is_exact = kind != "json" or (not groups["blank"] and groups["key"] in ("", " "))
    after = block[found.end() :]
    return WrittenCall(kind, before, middle, after, between, separators if is_exact else None, groups.get("quote", ""))


def _block(written: str, syntax: CallSyntax) -> str:
    """Cut out what is read as calls; "": nothing is."""
    at = min((at for start in syntax.starts if (at := written.find(start)) >= 0), default=len(written))
    cursor = TextCursor()
    cursor.text, cursor.is_whole = written[at:], True
    reading = syntax.read(cursor, KnownTools(frozenset({NAME})))
    try:
        while True:
            next(reading)
    except StopIteration as end:
        return cursor.text[: cursor.at] if end.value else ""


def _written(template: ChatTemplate, chat_template: str | None, names: tuple[str, ...]) -> str | None:
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": dict(ARGUMENTS)}}
        for id_, name in zip(_IDS, names, strict=False)
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    tools = [_tool(name) for name in (NAME, _SECOND)]
    try:
        asked = template.render([_ASKED], tools=tools, chat_template=chat_template)
        whole = template.render([_ASKED, turn], tools=tools, chat_template=chat_template, add_generation_prompt=False)
    except ChatTemplateError:
        return None
    same = next((i for i, (one, other) in enumerate(zip(asked, whole, strict=False)) if one != other), len(asked))
    while same and whole[same - 1] in "<[":  # the prompt ends with a marker, which begins as that of calls does
        same -= 1
    return whole[same:]


def _tool(name: str) -> dict[str, Any]:
    valley = {"type": "string", "description": "Where."}
    parameters = {"type": "object", "properties": {"valley": valley}, "required": ["valley"]}
    return {"type": "function", "function": {"name": name, "description": "Finds it.", "parameters": parameters}}
