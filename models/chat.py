"""Chat templates: messages to the text a model was tuned on, and that text to token ids.

Templates are Jinja programs from untrusted files, so they run in jinja2's immutable sandbox with the few extras that
Hugging Face's templates use (`raise_exception`, `strftime_now`, `tojson`, trimmed blocks). No tools, no images.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ChatTemplateError
from .tokenizer import Tokenizer

type Message = Mapping[str, str]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own tojson escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class ChatTemplate:
    """One model's chat template."""

    def __init__(self, source: str | None, tokenizer: Tokenizer, *, name: str) -> None:
        """`source` is the Jinja text, None where the model has none; `name` is the model's, for messages."""
        self._source, self._tokenizer, self._name = source, tokenizer, name
        self._compiled: jinja2.Template | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: dicts with the strings "role" and "content".
            add_generation_prompt: whether to open the assistant's turn at the end.

        Raises:
            ChatTemplateError: no template, messages of another form, or a template that fails.
        """
        check_messages(messages)
        try:
            return self._template().render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._tokenizer.bos_token or "",
                eos_token=self._tokenizer.eos_token or "",
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(f"The chat template of {self._name} failed: {_one_line(error)}") from None

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `render`; BOS only where the template writes it. Raises as `render` does."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.encode(text, add_special=False)

    def _template(self) -> jinja2.Template:
        if self._source is None:
            raise ChatTemplateError(f"{self._name} has no chat template: give it the prompt as plain text.")
        if self._compiled is None:
            self._compiled = _environment().from_string(self._source)
        return self._compiled


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is not a non-empty list of dicts with the strings "role" and "content".

    Raises:
        ChatTemplateError: says which message is wrong and how.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("A chat needs a non-empty list of messages with 'role' and 'content'.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"Message {index} is of type {type(message).__name__}, expected a dict.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ChatTemplateError(f"Message {index} needs a string under {key!r}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "." if str(error) else f"{type(error).__name__}."
