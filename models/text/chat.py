"""Chat templates: convert messages and tools to the text a model was tuned on, and that text to token ids.

The template decides what a message needs besides its role: all its keys are passed on, in the form that it takes.
`chat_messages.py` reads what callers give, `chat_forms.py` finds that form, `chat_program.py` runs the template.
Text only: no images. `chat_files.py` and the checkpoints read templates from files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, cast

from ..errors import ChatTemplateError
from .chat_forms import FormFinder, adapt_developer, adapt_names
from .chat_messages import Message, Tool, plain, read_messages, read_tools
from .chat_program import ChatProgram
from .tokenizer import Tokenizer

type Source = str | Mapping[str, str] | Sequence[Mapping[str, str]] | None
"""One template, or several by name, as a dict or as [{"name": ..., "template": ...}]; None: the model has none."""

type ReasoningEffort = Literal["low", "medium", "high"]
"""How long a model is to think before it answers, as OpenAI's and vLLM's bodies have it."""
EFFORTS = ("low", "medium", "high")

# What `render` has arguments for, besides "documents" and special tokens, which are variables like any other.
_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
# Templates that callers give are compiled once each while there are no more than this.
_GIVEN_TEMPLATES = 32
# As in transformers; the space at its end tells whether the template trims what it is given.
_END = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatOptions(TypedDict, total=False):
    """What `ChatTemplate.render` takes besides messages and tools; it says what each means."""

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    reasoning_effort: ReasoningEffort | None


@dataclass(frozen=True)
class _Compiled:
    program: ChatProgram
    forms: FormFinder
    label: str  # what it is called in messages
    takes_tools: bool


class ChatTemplate:
    """The chat templates of one model.

    Args:
        source: the templates' Jinja texts.
        tokenizer: the model's.
        name: the model's, for messages.

    Raises:
        ChatTemplateError: `source` has another form.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, *, name: str) -> None:
        self._tokenizer, self.name = tokenizer, name
        self.templates = _by_name(source, name)  # Jinja texts by name, usually "default" only
        self._compiled: dict[str, _Compiled] = {}
        self._given: dict[str, _Compiled] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: ReasoningEffort | None = None,
    ) -> str:
        """Render the conversation as text, with special tokens written out.

        Among several templates "tool_use" is chosen if there are tools, else "default", as in transformers.

        Args:
            messages: dicts with the string "role" and what the template reads: "content", "tool_calls" and the like;
                also as OpenAI's API writes them, see `chat_messages.py`.
            tools: JSON schemas of the functions that the model may call; None: no tools.
            add_generation_prompt: whether to open the assistant's turn at the end.
            continue_final_message: whether to leave the last message open, for the model to go on with it.
            chat_template: another template, a Jinja text or the name of one of the model's; None: as above.
            chat_template_kwargs: variables that the template reads, such as {"enable_thinking": False}; those that are
                None count as absent.
            reasoning_effort: the variable of this name: "low", "medium" or "high". What else a template knows may be in
                `chat_template_kwargs`.

        Raises:
            ChatTemplateError: no template, messages, tools or variables of another form, a template that has no place
                for one of them, or that fails.
        """
        conversation, schemas = read_messages(messages), read_tools(tools)
        try:
            template = self._template(chat_template, has_tools=schemas is not None)
            _check_tools(schemas, template)
            given = _variables(chat_template_kwargs, template)
            given |= _effort(reasoning_effort, given, template)
            variables = {"documents": None, **self._names(), **given}
            variables |= {"tools": schemas, "add_generation_prompt": add_generation_prompt}
            chat, origins = adapt_developer(adapt_names(conversation, template.program.names), template.program.names)
            chat = template.forms.find(chat, variables, origins).apply(chat)
            if continue_final_message:
                return _left_open(template, chat, variables)
            return template.program.render(chat, variables)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(f"{self._label(chat_template)} failed: {_sentence(error)}") from None

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        at_most: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Render the conversation and convert it to token ids, with BOS only where the template writes it.

        Arguments and errors are those of `render`; `at_most` is as for `Tokenizer.encode`, whose errors it raises too.
        """
        text = self.render(messages, tools=tools, **options)
        return self._tokenizer.encode(text, add_special=False, at_most=at_most)

    def _names(self) -> dict[str, str]:
        """Return the special tokens that the model has, by the names that templates use, as transformers does."""
        special = self._tokenizer.special
        return {**special.others, **special.standard}

    def _label(self, given: str | None) -> str:
        if given is None or given in self.templates:
            return f"The chat template of {self.name}"
        return "The chat_template that was given"

    def _template(self, given: str | None, has_tools: bool) -> _Compiled:
        if given is not None and not isinstance(given, str):
            raise ChatTemplateError(f"chat_template is of type {type(given).__name__}, expected a Jinja text.")
        if given is not None and given not in self.templates:
            if not given.strip() or not {"{", "\n"} & set(given):
                names = ", ".join(map(repr, self.templates)) or "none"
                raise ChatTemplateError(
                    f"chat_template={given!r} is neither a Jinja text nor the name of a template of {self.name} "
                    f"({names})."
                )
            if len(self._given) >= _GIVEN_TEMPLATES and given not in self._given:
                self._given.clear()
            return self._compile(given, given, self._given)
        chosen = given or ("tool_use" if has_tools and "tool_use" in self.templates else "default")
        if not self.templates:
            raise ChatTemplateError(f"{self.name} has no chat template: give it the prompt as plain text.")
        if chosen not in self.templates:
            names = ", ".join(map(repr, self.templates))
            raise ChatTemplateError(f"{self.name} has no chat template 'default', only {names}.")
        return self._compile(chosen, self.templates[chosen], self._compiled)

    def _compile(self, key: str, text: str, cache: dict[str, _Compiled]) -> _Compiled:
        compiled = cache.get(key)
        if compiled is None:
            program, label = ChatProgram(text), self._label(key)
            takes_tools = "tools" in program.variables or key == "tool_use"
            compiled = cache[key] = _Compiled(program, FormFinder(program, label), label, takes_tools)
        return compiled


def _check_tools(tools: Sequence[Tool] | None, template: _Compiled) -> None:
    if tools is not None and not template.takes_tools:
        raise ChatTemplateError(f"{template.label} takes no tools: the model was not tuned on any. Leave them out.")


def _variables(given: Mapping[str, Any] | None, template: _Compiled) -> dict[str, Any]:
    """Return what a caller sets besides, refusing what the template would not look at."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ChatTemplateError(f"chat_template_kwargs is of type {type(given).__name__}, expected a dict.")
    for name in given:
        if name in _ARGUMENTS:
            raise ChatTemplateError(f"chat_template_kwargs holds {name!r}, which is an argument of its own.")
        if name not in template.program.variables:
            names = ", ".join(map(repr, sorted(template.program.settable.difference(_ARGUMENTS)))) or "none"
            raise ChatTemplateError(
                f"{template.label} does not read {name!r} (in chat_template_kwargs): it reads {names}."
            )
    return {name: plain(value, "chat_template_kwargs") for name, value in given.items() if value is not None}


def _effort(effort: object, given: Mapping[str, Any], template: _Compiled) -> dict[str, Any]:
    """Return the variable for how long to think, if that is asked for and the template reads it."""
    if effort is None:
        return {}
    check_effort(effort, given)
    if "reasoning_effort" not in template.program.variables:
        raise ChatTemplateError(
            f"{template.label} does not read 'reasoning_effort': the model was not tuned on it. Leave it out."
        )
    return {"reasoning_effort": effort}


def check_effort(effort: object, variables: Mapping[str, Any]) -> None:
    """Refuse another `reasoning_effort` than there is, or one that differs from that among the variables."""
    if effort not in EFFORTS:
        raise ChatTemplateError(f"reasoning_effort={effort!r} is not usable: it must be one of {', '.join(EFFORTS)}.")
    if variables.get("reasoning_effort", effort) != effort:
        raise ChatTemplateError(
            f"reasoning_effort={effort!r} and {variables['reasoning_effort']!r} in chat_template_kwargs differ: keep "
            "one of them."
        )


def _left_open(template: _Compiled, chat: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """Render the conversation up to the end of its last message, as transformers does."""
    if variables["add_generation_prompt"]:
        raise ChatTemplateError(
            "continue_final_message and add_generation_prompt exclude each other: the one leaves the last message "
            "open, the other begins a new one. Set add_generation_prompt to False."
        )
    content = chat[-1]["content"]
    if not content or "content" not in template.program.names:
        raise ChatTemplateError("continue_final_message: the last message has no content to continue.")
    if isinstance(content, list):
        said = content[-1]["text"]
        content = [*content[:-1], {**content[-1], "text": said + _END}]
    else:
        said, content = content, content + _END
    text = template.program.render([*chat[:-1], {**chat[-1], "content": content}], variables)
    if said.strip() not in text or _END.strip() not in text:
        raise ChatTemplateError(
            f"continue_final_message: {template.label[0].lower()}{template.label[1:]} leaves out a part of the last "
            "message, so that there is no place to continue from."
        )
    start = text.rindex(_END.strip())
    whole = text[start:].startswith(_END)
    return text[:start] if whole else text[:start].rstrip()


def _by_name(source: Source, name: str) -> dict[str, str]:
    if source is None:
        return {}
    named: object = source
    if isinstance(source, str):
        named = {"default": source}
    elif isinstance(source, list | tuple) and all(isinstance(item, Mapping) for item in source):
        named = {item.get("name"): item.get("template") for item in source}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for item in named.items() for text in item):
        raise ChatTemplateError(f"The chat template of {name} is neither a text nor texts by name.")
    return dict(cast(Mapping[str, str], named))


def _sentence(error: Exception) -> str:
    """Return an error's own words on one line, with a full stop where they have no end of their own."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith((".", "!", "?")) else words + "."
