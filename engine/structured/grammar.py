"""Grammars for one vocabulary: what a caller asks for is compiled, or refused in a sentence, before anything runs.

llguidance compiles; what it refuses, it refuses here, with the keyword or the position, and what it would take without
keeping to it is named once (`schema.py`). What it lets through, and stays so, is in the guide: keys in the schema's
order only, additional keys that may repeat each other, numbers as large as 1e999.
"""

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from ..host.extras import need
from .matcher import Matcher
from .opening import PROMPT_TAIL, Opening
from .params import StructuredOutputsParams
from .schema import can_end, closed, unknown_keywords, where
from .vocabulary import Vocabulary, Words

# Blanks between two parts of JSON: enough to indent, and no model can fill a page with them.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,40}"
_KEPT = 256  # compiled grammars, by what they are made of


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar; every completion gets a matcher of its own."""

    vocabulary: Vocabulary
    compiled: Any  # llguidance's matcher at the beginning
    opening: Opening | None  # None: it begins at once

    def matcher(self, prompt: Sequence[int] | np.ndarray = ()) -> Matcher:
        """Return what follows one answer to a prompt of these tokens."""
        tail = [] if self.opening is None else [int(token) for token in prompt[-PROMPT_TAIL:]]
        return Matcher(self.vocabulary, self.compiled.deep_copy(), self.opening, self.vocabulary.text_of(tail))


class Grammars:
    """The grammars of one engine, compiled once each. Any thread may ask."""

    def __init__(self, tokenizer: Words) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()
        self._vocabulary: Vocabulary | None = None
        self._made = OrderedDict[str, Grammar]()
        self._openings: dict[bytes, Opening] = {}
        self._named: set[str] = set()  # keywords that were named

    def compile(self, params: StructuredOutputsParams, after: bytes | None = None) -> Grammar:
        """Compile what is asked for; `after` is a pattern of what ends the free part where `params` says nothing.

        Raises:
            ValueError: a schema, regular expression or grammar that is wrong, that nothing can satisfy, or that cannot
                be kept to; or llguidance is not installed.
        """
        if params.after is not None:
            after = re.escape(params.after.encode())
        source = _source(params)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer)
            key = f"{source}\0{after!r}"
            if key not in self._made:
                self._made[key] = self._compile(params, source, after, self._vocabulary)
                if len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]

    def _compile(
        self, params: StructuredOutputsParams, source: str, after: bytes | None, vocabulary: Vocabulary
    ) -> Grammar:
        matcher = vocabulary.guidance.LLMatcher(vocabulary.tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(_refusal(params, matcher.get_error()))
        if params.is_json and not can_end(params.schema()):
            raise ValueError(
                "structured_outputs.json admits nothing that ends (each instance requires another one inside): make a "
                "property on the way optional."
            )
        grammar = Grammar(vocabulary, matcher, self._opening(after, vocabulary))
        if not Matcher(vocabulary, matcher.deep_copy(), None).admits_something():
            raise ValueError(f"structured_outputs.{params.kind} admits nothing: loosen it.")
        if params.is_json:
            self._name_unknown(params.schema())
        return grammar

    def _opening(self, after: bytes | None, vocabulary: Vocabulary) -> Opening | None:
        if after is None:
            return None
        if after not in self._openings:
            self._openings[after] = Opening(after, vocabulary.pieces)
        return self._openings[after]

    def _name_unknown(self, schema: object) -> None:
        """Name, once, keywords that change nothing."""
        for keyword, pointer in unknown_keywords(schema).items():
            if keyword not in self._named:
                self._named.add(keyword)
                warnings.warn(
                    f"structured_outputs.json has {keyword!r} at {pointer or 'the top'}, which is no keyword that is "
                    "kept to: the answer is not bound by it.",
                    stacklevel=2,
                )


def _source(params: StructuredOutputsParams) -> str:
    """Write down the grammar as llguidance takes it."""
    guidance: Any = need("llguidance", "structured", "structured output")
    if params.is_json:
        schema = params.schema()
        if params.disable_additional_properties:
            schema = closed(schema)
        if schema is False:
            raise ValueError("structured_outputs.json is False, which admits nothing: give a schema.")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError("structured_outputs.json is no JSON schema: it must be an object, or True.")
        blanks = {"whitespace_flexible": False} if params.disable_any_whitespace else {}
        if not blanks:
            blanks = {"whitespace_pattern": params.whitespace_pattern or _BLANKS}  # type: ignore[dict-item]
        made: str = guidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"lenient": False, "coerce_one_of": False, **blanks}
        )
        return made
    if params.kind == "regex":
        return str(guidance.LLMatcher.grammar_from_regex(params.regex))
    if params.kind == "choice":
        return str(guidance.grammar_from("choice", json.dumps(list(params.choice or ()))))
    try:
        return str(guidance.grammar_from("grammar", params.grammar))
    except ValueError as error:
        reason = " ".join(str(error).removeprefix("Failed to convert the grammar from GBNF to Lark: ").split())
        raise ValueError(f"structured_outputs.grammar is no GBNF ({reason}): correct it there.") from None


def _refusal(params: StructuredOutputsParams, error: str) -> str:
    """Say in one sentence what llguidance refuses, and where."""
    name = f"structured_outputs.{params.kind}"
    if found := re.search(r'Unimplemented keys: \["(.*?)"[\],]', error):
        keyword = found[1]
        return (
            f"{name} has the keyword {keyword!r} {where(params.schema(), keyword)}, which cannot be kept to: remove "
            "it, and check answers for it."
        )
    if "oneOf constraints are not supported" in error:
        return (
            f"{name} has a 'oneOf' {where(params.schema(), 'oneOf')} whose schemas may overlap, which cannot be kept "
            "to: write 'anyOf', or tell them apart by types or constants."
        )
    if found := re.search(r"Unknown format: (\S+)", error):
        return f"{name} has the format {found[1]!r}, which cannot be kept to: remove it, or write a 'pattern'."
    if found := re.search(r"Unsatisfiable schema: ([^\n]*)", error):
        return f"{name} admits nothing ({_short(found[1])}): loosen it."
    if params.kind == "regex":
        return f"{name} is not usable ({_regex_reason(params.regex or '', error)}): correct it there."
    if found := re.match(r"(?:at )?(\d+)\((\d+)\): ([^\n]*)", error):
        return f"{name} is wrong at line {found[1]}, column {found[2]} ({_short(found[3])}): correct it there."
    return f"{name} is not usable ({_short(error)}): correct it."


def _regex_reason(regex: str, error: str) -> str:
    """Say what is wrong with a regular expression, and at which character."""
    reason = re.search(r"\nerror: ([^\n]*)", error)
    caret = re.search(r"regex parse error:\n    [^\n]*\n    ( *)\^", error)
    if reason and caret:
        return f"{reason[1]} at character {len(caret[1]) + 1} of {_short(regex)!r}"
    plain = re.search(r"\(in regex\): ([^\n]*?)(?: in regex /|\n|$)", error)
    return f"{_short(plain[1] if plain else error)} in {_short(regex)!r}"


def _short(text: str) -> str:
    joined = " ".join(text.split()).rstrip(". ")
    return joined if len(joined) <= 200 else f"{joined[:200]}..."
