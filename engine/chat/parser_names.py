"""What reads calls and reasoning, by vLLM's names of its parsers. No tokenizer, no template.

The names are those of vLLM 0.32's options `tool_call_parser` and `reasoning_parser`; what is missing there is not read
here. Harmony, which is read from token ids, has names and no entry of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .call_syntax import CallSyntax
from .json_calls import DeepSeekV3Calls, HermesCalls, Llama3Calls, MistralCalls
from .marked_calls import FUNCTION_GEMMA, GEMMA4, PythonCalls, QwenCoderCalls
from .text_parser import ReasoningTags

HARMONY_CALLS, HARMONY_REASONING = "openai", "openai_gptoss"
# In the order in which a template is tried on them: what reads less before what reads more.
SYNTAXES: Mapping[str, CallSyntax] = {
    "hermes": HermesCalls(),
    "qwen3_coder": QwenCoderCalls(),
    "mistral": MistralCalls(),
    "deepseek_v3": DeepSeekV3Calls(),
    "functiongemma": FUNCTION_GEMMA,
    "gemma4": GEMMA4,
    "pythonic": PythonCalls(),
    "llama3_json": Llama3Calls(),
}
_OTHER_NAMES = {"qwen3_json": "hermes", "qwen3_xml": "qwen3_coder"}


@dataclass(frozen=True)
class Reasoning:
    """How reasoning is marked."""

    tags: ReasoningTags
    is_always: bool = False  # an answer begins with it although nothing says so


_THINK = ReasoningTags("<think>", "</think>")
REASONINGS: Mapping[str, Reasoning] = {
    "qwen3": Reasoning(_THINK),
    "deepseek_r1": Reasoning(_THINK, is_always=True),
    "mistral": Reasoning(ReasoningTags("[THINK]", "[/THINK]")),
    "gemma4": Reasoning(ReasoningTags("<|channel>thought\n", "<channel|>")),
}
TOOL_CALL_PARSERS = tuple(sorted({*SYNTAXES, *_OTHER_NAMES, HARMONY_CALLS}))
REASONING_PARSERS = tuple(sorted({*REASONINGS, HARMONY_REASONING}))


def own_name(tool_call_parser: str) -> str:
    """Return the name under which `SYNTAXES` has what vLLM has under several."""
    return _OTHER_NAMES.get(tool_call_parser, tool_call_parser)


def check_names(tool_call_parser: object, reasoning_parser: object) -> None:
    """Refuse a parser that does not exist.

    Raises:
        ValueError: names those that do.
    """
    for option, given, known in (
        ("tool_call_parser", tool_call_parser, TOOL_CALL_PARSERS),
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
    ):
        if given is not None and given not in known:
            raise ValueError(
                f"{option}={given!r} is not usable: use one of {', '.join(known)}, or leave it out, and the chat "
                "template says what the model writes."
            )
