"""How a model is talked to: what makes a prompt of a conversation, and what reads the answer.

The model's own template is the reference. A model without one that has the markers of the harmony format is talked to
in that; `chat_template="harmony"` asks for it of one that has a template. Answers are read by their vocabulary,
whatever has written the prompt.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Unpack

from ...models.text.chat import ChatOptions, ChatTemplate
from ...models.text.chat_messages import Message, Tool
from ...models.text.tokenizer import Tokenizer
from .answers import AnswerFormat
from .harmony_parser import HarmonyFormat
from .harmony_prompt import HarmonyPrompts

HARMONY = "harmony"
# Where an answer begins that the user is to read.
FINAL_CHANNEL = rb"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"


class ChatFormat:
    """The format of one model's conversations and answers."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template

    @cached_property
    def answers(self) -> AnswerFormat | None:
        """The format by which answers are read into parts; None: none is known for this model."""
        markers = self._tokenizer.harmony
        return None if markers is None else HarmonyFormat(self._tokenizer, markers)

    @property
    def reasoning_end(self) -> bytes | None:
        """The pattern of what comes before what an answer says to the user, behind its reasoning; None: not known.

        Harmony's final channel, which may name what it is constrained to.
        """
        return None if self._tokenizer.harmony is None else FINAL_CHANNEL

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
