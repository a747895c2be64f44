"""Which parsers read what a model writes: found by what its own chat template writes.

A conversation with a call is rendered, and what reads that call back is what reads the model's. Only where a template
cannot be rendered so do its words decide. Reasoning has no such proof, since templates leave it out on purpose: its
tags are in the template's text.
"""

import json
from dataclasses import dataclass

from ...models.text.chat import ChatTemplate
from ...models.text.tokenizer import Tokenizer
from .answers import Piece, joined
from .call_syntax import CallSyntax, KnownTools
from .parser_names import HARMONY_CALLS, HARMONY_REASONING, REASONINGS, SYNTAXES, Reasoning, own_name
from .text_parser import TextFormat, TextParser
from .written_calls import ARGUMENTS, NAME, WrittenCall, around_calls, written_call


@dataclass(frozen=True)
class Parsers:
    """What reads the answers to one template's prompts."""

    syntax: CallSyntax | None  # None: calls in no form that is known
    reasoning: Reasoning | None  # None: no reasoning
    calls: str | None = None  # the name of `syntax`
    thoughts: str | None = None  # the name of `reasoning`
    written: WrittenCall | None = None  # what the template writes around calls; None: it cannot be told


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
    syntax, reasoning = SYNTAXES.get(calls or ""), REASONINGS.get(thoughts or "")
    written = None if syntax is None else around_calls(template, chat_template, syntax)
    return Parsers(syntax, reasoning, calls, thoughts, written)


def _calls(template: ChatTemplate, tokenizer: Tokenizer, chat_template: str | None, source: str) -> str | None:
    written = written_call(template, chat_template)
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


def _reads(syntax: CallSyntax, tokenizer: Tokenizer, written: str) -> bool:
    """Whether a syntax finds the call in what a template writes for it."""
    if _is_bare(syntax) and not written.lstrip().startswith(syntax.starts):
        return False
    tools = KnownTools(frozenset({NAME}), {NAME: {"valley": frozenset({"string"})}})
    parser = TextParser(TextFormat(tokenizer, None, syntax, tools), False, lambda: "")
    found = joined((parser.push([Piece(-1, written)]), parser.finish())).tool_calls
    return [(call.name, json.loads(call.arguments)) for call in found] == [(NAME, ARGUMENTS)]


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
