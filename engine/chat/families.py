"""Which parsers read what a model writes: found by what its own chat template writes.

A conversation with a call is rendered, and what reads that call back is what reads the model's. Only where a template
cannot be rendered so do its words decide. Reasoning has no such proof, since templates leave it out on purpose: its
tags are in the template's text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...models.errors import ChatTemplateError
from ...models.text.chat import ChatTemplate
from ...models.text.tokenizer import Tokenizer
from .answers import Piece, joined
from .call_syntax import CallSyntax, KnownTools
from .parser_names import HARMONY_CALLS, HARMONY_REASONING, REASONINGS, SYNTAXES, Reasoning, own_name
from .text_parser import TextFormat, TextParser

_NAME, _ARGUMENTS = "find_glacier", {"valley": "Jostedal"}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Finds a glacier.",
        "parameters": {
            "type": "object",
            "properties": {"valley": {"type": "string", "description": "Where."}},
            "required": ["valley"],
        },
    },
}
_ASKED: Mapping[str, Any] = {"role": "user", "content": "Where is it?"}
_CALLED: Mapping[str, Any] = {
    "role": "assistant",
    "content": "",
    # Mistral's templates want nine letters and digits.
    "tool_calls": [{"id": "glacier01", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}


@dataclass(frozen=True)
class Parsers:
    """What reads the answers to one template's prompts."""

    syntax: CallSyntax | None  # None: calls in no form that is known
    reasoning: Reasoning | None  # None: no reasoning
    calls: str | None = None  # the name of `syntax`
    thoughts: str | None = None  # the name of `reasoning`


def find_parsers(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    chat_template: str | None,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
) -> Parsers:
    """Find what reads the answers to prompts by `chat_template`, as `ChatTemplate.render` takes it; the last two are
    the names of parsers that were asked for.

    Raises:
        ValueError: one that was asked for does not fit.
    """
    source = "\n".join(template.templates.values()) if chat_template in (None, *template.templates) else chat_template
    label = f"the chat template of {template.name}" if source is not chat_template else "the chat_template given"
    calls = _calls(template, tokenizer, chat_template, source or "")
    if tool_call_parser is not None:
        calls = _checked_calls(tool_call_parser, calls, source or "", label)
    thoughts = _thoughts(source or "")
    if reasoning_parser is not None:
        thoughts = _checked_thoughts(reasoning_parser, source or "", tokenizer, label)
    return Parsers(
        None if calls is None else SYNTAXES[calls], None if thoughts is None else REASONINGS[thoughts], calls, thoughts
    )


def _calls(template: ChatTemplate, tokenizer: Tokenizer, chat_template: str | None, source: str) -> str | None:
    written = _written_call(template, chat_template)
    if written is not None:
        return next((name for name, syntax in SYNTAXES.items() if _reads(syntax, tokenizer, written)), None)
    marked = (name for name, syntax in SYNTAXES.items() if any(text in source for text in _own_starts(syntax)))
    return next(marked, None)


def _own_starts(syntax: CallSyntax) -> list[str]:
    """Return the texts by which calls are known even where nothing else is: a bracket is in every template."""
    return [start for start in syntax.starts if len(start) > 1]


def _is_bare(syntax: CallSyntax) -> bool:
    """Whether calls may begin with a bracket alone, which also stands behind markers of other forms."""
    return len(_own_starts(syntax)) < len(syntax.starts)


def _written_call(template: ChatTemplate, chat_template: str | None) -> str | None:
    """Return what the template writes for a call behind the words of a user's turn; None: it cannot be rendered."""
    try:
        asked = template.render([_ASKED], tools=[_TOOL], chat_template=chat_template)
        whole = template.render(
            [_ASKED, _CALLED], tools=[_TOOL], chat_template=chat_template, add_generation_prompt=False
        )
    except ChatTemplateError:
        return None
    same = next((i for i, (one, other) in enumerate(zip(asked, whole, strict=False)) if one != other), len(asked))
    return whole[same:]


def _reads(syntax: CallSyntax, tokenizer: Tokenizer, written: str) -> bool:
    """Whether a syntax finds the call in what a template writes for it."""
    if _is_bare(syntax) and not written.lstrip().startswith(syntax.starts):
        return False
    tools = KnownTools(frozenset({_NAME}), {_NAME: {"valley": frozenset({"string"})}})
    parser = TextParser(TextFormat(tokenizer, None, syntax, tools), False, lambda: "")
    found = joined((parser.push([Piece(-1, written)]), parser.finish())).tool_calls
    return [(call.name, json.loads(call.arguments)) for call in found] == [(_NAME, _ARGUMENTS)]


def _checked_calls(asked: str, found: str | None, source: str, label: str) -> str | None:
    name = own_name(asked)
    if name == HARMONY_CALLS:
        raise ValueError(f"tool_call_parser={asked!r} does not fit {label}: it is for models with harmony's markers.")
    if found is not None and found != name:
        raise ValueError(
            f"tool_call_parser={asked!r} does not fit {label}, which writes calls as {found!r} reads them: leave it "
            "out."
        )
    syntax = SYNTAXES[name]
    is_spelled = _is_bare(syntax) or any(start in source for start in syntax.starts)
    if found is None and ("tools" not in source or not is_spelled):
        raise ValueError(
            f"tool_call_parser={asked!r} does not fit {label}, which writes no calls of that form: leave it out."
        )
    return name


def _thoughts(source: str) -> str | None:
    return next((name for name, one in REASONINGS.items() if one.tags.close.strip() in source), None)


def _checked_thoughts(asked: str, source: str, tokenizer: Tokenizer, label: str) -> str:
    if asked == HARMONY_REASONING:
        raise ValueError(f"reasoning_parser={asked!r} does not fit {label}: it is for models with harmony's markers.")
    tags = REASONINGS[asked].tags
    words = tags.open.strip(), tags.close.strip()
    if tags.close.strip() not in source and any(tokenizer.backend.token_to_id(word) is None for word in words):
        raise ValueError(
            f"reasoning_parser={asked!r} does not fit {label}: neither that nor the vocabulary has {words[0]} and "
            f"{words[1]}; leave it out."
        )
    return asked
