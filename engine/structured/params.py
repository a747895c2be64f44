"""What the text of an answer has to keep to, as callers write it, with vLLM's names. Knows no tokenizer.

To have a completion keep to a grammar, from any part of the engine, is to give `SamplingParams` one of these:

    dataclasses.replace(params, structured_outputs=StructuredOutputsParams(grammar=lark, after="</think>"))

`grammar.py` compiles it for one vocabulary before the request starts, and says there what cannot be kept to.
"""

import json as json_library
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

MOST_AFTER = 128  # bytes of `after`, which is looked for at the end of what has come
type Kind = Literal["json", "regex", "choice", "grammar", "json_object"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer has to be, from its first token to its end: exactly one of the first five, with vLLM's names.

    The answer ends where what is asked for ends, and nowhere before; `max_tokens` alone cuts it off. It needs the
    package of the extra `structured`.

    Raises:
        ValueError: none or several of the five, or a value of another kind.
    """

    json: str | Mapping[str, Any] | bool | None = field(default=None, hash=False)  # a JSON schema, or its text
    regex: str | None = None  # a regular expression of Rust's `regex` crate that the whole answer matches
    choice: Iterable[str] | None = None  # the answer is one of these texts
    grammar: str | None = None  # in Lark's notation with llguidance's additions, or in GBNF (with `root ::=`)
    json_object: bool | None = None  # True: some JSON object
    disable_any_whitespace: bool = False  # JSON without blanks between its parts; else at most 40 in a row
    disable_additional_properties: bool = False  # objects have no keys but those that the schema names
    whitespace_pattern: str | None = None  # a regular expression for blanks between parts of JSON
    after: str | None = None  # Twinmesh's own: what comes before this text, and the text, is free, as reasoning is

    def __post_init__(self) -> None:
        """Check that it asks for one thing, and every value's kind."""
        asked = [name for name in KINDS if getattr(self, name) not in (None, *([False] * (name == "json_object")))]
        if len(asked) != 1:
            found = " and ".join(asked) or "none"
            raise ValueError(f"structured_outputs needs one of {', '.join(KINDS)}, and has {found}: give one.")
        for name in ("regex", "grammar", "whitespace_pattern", "after"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(_wrong(name, value, "a text that is not empty"))
        if self.after is not None and len(self.after.encode(errors="replace")) > MOST_AFTER:
            raise ValueError(f"structured_outputs.after has more than {MOST_AFTER} bytes: give the end of that text.")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "json_object" and value is None):
                raise ValueError(_wrong(name, value, "True or False"))
        if self.json is not None and not isinstance(self.json, str | bool | Mapping):
            raise ValueError(_wrong("json", self.json, "a JSON schema, as a dict or a text"))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        self._check_blanks()

    @property
    def kind(self) -> Kind:
        """Return which of the five it asks for."""
        return next(name for name in KINDS if getattr(self, name) not in (None, *([False] * (name == "json_object"))))

    @property
    def is_json(self) -> bool:
        """Return whether it asks for JSON."""
        return self.kind in ("json", "json_object")

    def schema(self) -> object:
        """Return the JSON schema of one that asks for JSON, read.

        Raises:
            ValueError: its text is no JSON.
        """
        if self.kind == "json_object":
            return {"type": "object"}
        if not isinstance(self.json, str):
            return _plain(self.json)
        try:
            return json_library.loads(self.json)
        except json_library.JSONDecodeError as error:
            raise ValueError(
                f"structured_outputs.json is not JSON ({error.msg} at line {error.lineno}, column {error.colno}): "
                "correct it there, or give the schema as a dict."
            ) from None
        except RecursionError:
            raise ValueError("structured_outputs.json is nested too deeply: give a flatter schema.") from None

    def _check_blanks(self) -> None:
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                "structured_outputs has both disable_any_whitespace and whitespace_pattern: leave one of them out."
            )
        given = [f.name for f in fields(self) if f.name.startswith(("disable", "whitespace")) and getattr(self, f.name)]
        if given and not self.is_json:
            raise ValueError(f"structured_outputs.{given[0]} is about JSON, and {self.kind} is not: leave it out.")


def _wrong(name: str, value: object, wanted: str) -> str:
    return f"structured_outputs.{name}={value!r} is not usable: it must be {wanted}."


def _choices(given: object) -> tuple[str, ...]:
    wanted = "a list of texts, at least one, none of them empty"
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(_wrong("choice", given, wanted))
    texts = tuple(given)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(_wrong("choice", list(texts), wanted))
    return tuple(dict.fromkeys(cast(tuple[str, ...], texts)))


def _plain(schema: object) -> object:
    """Return a schema as JSON would have it, mappings as dicts.

    Raises:
        ValueError: something in it that JSON has not.
    """
    try:
        return json_library.loads(json_library.dumps(schema, default=_mapping, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.json is not JSON ({error}): give a schema of JSON's values.") from None


def _mapping(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it holds a {type(value).__name__}")
