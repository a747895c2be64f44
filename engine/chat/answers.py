"""What an answer is read into, and the contract of what reads it. No JAX, no tokenizer.

A format of answers is an `AnswerFormat`; for each completion it gives an `AnswerParser`, which takes pieces of the
answer as they come and says what they add. Invariants of every parser: it never raises, whatever the model writes; of
the text that is no markup nothing is lost, in whatever order it comes; what was given out is never taken back; markup
is in no part, unless it marks nothing. How tokens become pieces, and where a stop string cuts them, is `reader.py`'s
business.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that an answer asks for, or what is new of it: all parts of one call have its id and name."""

    id: str  # no other call has it: a message with the role "tool" names it as its `tool_call_id`
    name: str  # of the function
    arguments: str  # as the model wrote them: JSON, unless it was cut off or got it wrong


class Parts(NamedTuple):
    """An answer, or what is new of it, in its parts."""

    reasoning: str = ""  # what the model thinks, which is not meant for the user
    content: str = ""  # what it says
    tool_calls: tuple[ToolCall, ...] = ()


NOTHING = Parts()


class Piece(NamedTuple):
    """A token of an answer and the text that it completes, special tokens written out."""

    token_id: int  # -1: text that is left over of earlier tokens
    text: str


class AnswerParser(Protocol):
    """Reads one answer."""

    def push(self, pieces: Iterable[Piece]) -> Parts:
        """Take what comes next; return what is new for certain."""
        ...

    def finish(self) -> Parts:
        """Return what was held back; nothing comes any more."""
        ...


class AnswerFormat(Protocol):
    """How a model writes its answers."""

    def parser(self, prompt: Sequence[int], new_id: Callable[[], str]) -> AnswerParser:
        """Return what reads an answer to this prompt, which may have begun it; `new_id` names its calls."""
        ...


def call_ids(answer: str) -> Callable[[], str]:
    """Return what names the calls of an answer, which has a name of its own: the same again for the same name."""
    numbers = itertools.count()
    return lambda: f"call_{blake2b(f'{answer}:{next(numbers)}'.encode(), digest_size=12).hexdigest()}"


def joined(parts: Iterable[Parts]) -> Parts:
    """Put parts together, those of one call too."""
    known = list(parts)
    calls: dict[str, ToolCall] = {}
    for call in (call for part in known for call in part.tool_calls):
        before = calls.get(call.id)
        calls[call.id] = call if before is None else ToolCall(call.id, call.name, before.arguments + call.arguments)
    return Parts("".join(p.reasoning for p in known), "".join(p.content for p in known), tuple(calls.values()))
