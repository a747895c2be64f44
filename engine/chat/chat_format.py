"""How a model is talked to: what makes a prompt of a conversation, and what reads the answer.

The model's own template is the reference. A model without one that has the markers of the harmony format is talked to
in that; `chat_template="harmony"` asks for it of one that has a template. Answers are read as harmony where the
vocabulary has its markers, whatever has written the prompt; else by what the template itself writes, see `families.py`.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Unpack

from ...models.text.chat import ChatOptions, ChatTemplate
from ...models.text.chat_messages import Message, Tool, read_messages
from ...models.text.tokenizer import Tokenizer
from .answers import AnswerFormat
from .call_grammar import CallGrammar, harmony_lark
from .families import Parsers, find_parsers
from .harmony_parser import HarmonyFormat
from .harmony_prompt import HarmonyPrompts
from .parser_names import HARMONY_CALLS, HARMONY_REASONING
from .text_parser import TextFormat
from .tool_use import ToolUse

HARMONY = "harmony"
# Templates that callers give are looked at once each while there are no more than this.
_TEMPLATES = 32
_TAIL = 64  # characters at the end of a prompt in which its last tag is looked for
# Where an answer begins that the user is to read.
FINAL_CHANNEL = rb"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"


class ChatFormat:
    """The format of one model's conversations and answers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        """Read answers by the parsers of these names, which exist; None: by what the model's template writes.

        Raises:
            ValueError: a parser does not fit the model's template.
        """
        self._tokenizer, self._template = tokenizer, template
        self._asked = tool_call_parser, reasoning_parser
        self._found: dict[str | None, Parsers] = {}
        if tokenizer.harmony is not None:
            self._check_harmony()
        elif any(self._asked):
            self._parsers(None)

    def answers(self, messages: Sequence[Message], use: ToolUse, options: ChatOptions) -> AnswerFormat | None:
        """Return the format by which answers to a conversation are read into parts; None: none is known for the model.

        Args:
            messages: that a prompt was made of.
            use: the request's tools.
            options: as for `ChatTemplate.render`.

        Raises:
            ValueError: a parser that was asked for does not fit the `chat_template` among the options.
        """
        if self._tokenizer.harmony is not None:
            return HarmonyFormat(self._tokenizer, self._tokenizer.harmony, use.most_calls)
        parsers = self._parsers(options.get("chat_template"))
        if parsers.syntax is None and parsers.reasoning is None:
            return None
        return self._text_format(parsers, messages, use, options)

    def _text_format(
        self, parsers: Parsers, messages: Sequence[Message], use: ToolUse, options: ChatOptions
    ) -> TextFormat:
        reasoning, syntax = parsers.reasoning, parsers.syntax if use.callable else None
        tags, always = (None, False) if reasoning is None else (reasoning.tags, reasoning.is_always)
        return TextFormat(self._tokenizer, tags, syntax, use.known, use.most_calls, always, _begun(messages, options))

    def grammar(
        self, prompt: str | Sequence[int], messages: Sequence[Message], use: ToolUse, options: ChatOptions
    ) -> tuple[str, str | None]:
        """Return the grammar, in llguidance's Lark, of answers to a prompt that have to call tools; and the text behind
        which it begins, None: at once.

        Args:
            prompt: as `prompt` or `encode` gave it; the others are as for `answers`.

        Raises:
            ValueError: calls in no form that is known, or parameters that the form cannot be held to.
        """
        if self._tokenizer.harmony is not None:
            return harmony_lark(use, self._special), None
        parsers = self._parsers(options.get("chat_template"))
        if parsers.syntax is None or parsers.written is None:
            raise ValueError(
                f"tool_choice cannot be kept to, because the chat template of {self._template.name} does not show how "
                "calls are written: use 'auto'."
            )
        form = self._text_format(parsers, messages, use, options)
        reasons = self._reasons(form, prompt)
        tags = None if form.tags is None else (form.tags.open, form.tags.close)
        writer = CallGrammar(parsers.written, self._special, parsers.syntax.markers | {*(tags or ())})
        lark = writer.lark(use, thinks=tags if reasons is None else None, may_begin_with_lines=reasons is True)
        return lark, tags[1] if tags is not None and reasons else None

    def _special(self, text: str) -> int | None:
        """Return the id of a special token; None: the text is none."""
        number = self._tokenizer.backend.token_to_id(text)
        return number if number in self._tokenizer.control_ids else None

    def _parsers(self, chat_template: str | None) -> Parsers:
        found = self._found.get(chat_template)
        if found is None:
            if len(self._found) >= _TEMPLATES:
                self._found.clear()
            found = find_parsers(self._template, self._tokenizer, chat_template, *self._asked)
            self._found[chat_template] = found
        return found

    def _check_harmony(self) -> None:
        """Refuse other parsers for a model whose vocabulary says what it writes."""
        options = zip(("tool_call_parser", "reasoning_parser"), self._asked, strict=True)
        for (option, asked), own in zip(options, (HARMONY_CALLS, HARMONY_REASONING), strict=True):
            if asked not in (None, own):
                raise ValueError(
                    f"{option}={asked!r} does not fit {self._template.name}, which writes in the harmony format: leave "
                    f"it out, or write {own!r}."
                )

    def reasoning_end(
        self, prompt: str | Sequence[int], messages: Sequence[Message], options: ChatOptions
    ) -> bytes | None:
        """Return the pattern of what comes before what an answer says to the user; None: nothing need come before it.

        Where the prompt has opened a block of reasoning its end, of harmony the final channel, which may name what it
        is constrained to. A model that opens a block by itself need not, and what it is held to begins at once.
        """
        if self._tokenizer.harmony is not None:
            return FINAL_CHANNEL
        parsers = self._parsers(options.get("chat_template"))
        form = self._text_format(parsers, messages, ToolUse(), options)
        return re.escape(form.tags.close.encode()) if form.tags is not None and self._reasons(form, prompt) else None

    def _reasons(self, form: TextFormat, prompt: str | Sequence[int]) -> bool | None:
        return form.reasons(prompt[-_TAIL:] if isinstance(prompt, str) else form.tail_of(prompt))

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **options: Unpack[ChatOptions]
    ) -> str | list[int]:
        """Turn a conversation into a text, with special tokens written out, or into token ids.

        Arguments and errors are those of `ChatTemplate.render`; ValueError too, where a package is missing.
        """
        if self._is_harmony(options.get("chat_template")):
            return self._harmony.encode(messages, tools, options)
        return self._template.render(messages, tools=tools, **options)

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        at_most: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Turn a conversation into token ids; arguments and errors are those of `ChatTemplate.encode`."""
        if self._is_harmony(options.get("chat_template")):
            return self._harmony.encode(messages, tools, options)
        return self._template.encode(messages, tools=tools, at_most=at_most, **options)

    def _is_harmony(self, asked: str | None) -> bool:
        known = self._template.templates
        return self._tokenizer.harmony is not None and (not known if asked is None else asked == HARMONY not in known)

    @cached_property
    def _harmony(self) -> HarmonyPrompts:
        return HarmonyPrompts(self._tokenizer, self._template.name)


def _begun(messages: Sequence[Message], options: ChatOptions) -> str:
    """Return the beginning of an answer that is to be gone on with."""
    content = read_messages(messages[-1:])[0].get("content", "") if options.get("continue_final_message") else ""
    return content if isinstance(content, str) else content[-1]["text"]
