"""Chat templates as the families write them, as short as can be, and a tokenizer that has their markers.

A template writes turns, tools and calls with the markers of the published one, and nothing else of it. Qwen 2.5's, Qwen
3's and Llama 3.1's own are in `fixtures/chat_openai.json`.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import ByteLevel
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer import SpecialTokens, Tokenizer

_PUBLISHED = Path(__file__).resolve().parents[1] / "fixtures" / "chat_openai.json"
_TURNS = """{%- if tools %}{{ tools | tojson }}
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}BLOCK<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
OPEN{% endif %}"""
_MARKED = {
    "mistral": '{% for c in m.tool_calls %}{{ "[TOOL_CALLS]" + c.function.name + "[ARGS]" }}'
    "{{ c.function.arguments | tojson }}{% endfor %}",
    "mistral list": "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}"
    '{{ ", " if not loop.last }}{% endfor %}]{% endif %}',
    "deepseek_v3": "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>function"  # noqa: RUF001
    "<｜tool▁sep｜>{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```<｜tool▁call▁end｜>"  # noqa: RUF001
    "{{ '\n' if not loop.last }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}",  # noqa: RUF001
    "functiongemma": """{% macro written(v) %}{% if v is string %}<escape>{{ v }}<escape>{% elif v is mapping %}{
{%- for k, x in v | items %}{{ k }}:{{ written(x) }}{{ ',' if not loop.last }}{% endfor %}}
{%- elif v is boolean or v is none or v is number %}{{ v | tojson }}{% else %}[{% for x in v %}{{ written(x) }}
{{- ',' if not loop.last }}{% endfor %}]{% endif %}{% endmacro %}
{%- for c in m.tool_calls %}<start_function_call>call:{{ c.function.name }}{{ written(c.function.arguments) }}
{{- '<end_function_call>' }}{% endfor %}""",
    "pythonic": "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %})"
    "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}",
    "qwen3_coder": "{% for c in m.tool_calls %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>\n{% endfor %}",
    "hermes": "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>\n{% endfor %}",
}
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<start_function_call>",
    "<end_function_call>", "<escape>",
)  # fmt: skip
PLAIN_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens that are in texts too
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "at": {"type": "object", "properties": {"lat": {"type": "number"}}},
            },
            "required": ["city"],
        },
    },
}
OTHER = {"type": "function", "function": {"name": "time.now", "parameters": {"type": "object", "properties": {}}}}


def source(family, *, opens=""):
    """The template of a family; `opens` is what it writes behind the assistant's header."""
    published = json.loads(_PUBLISHED.read_text())["templates"]
    if family in published:
        return published[family]
    return _TURNS.replace("BLOCK", _MARKED[family]).replace("OPEN", opens)


FAMILIES = {
    "qwen2_5": "hermes", "qwen3": "hermes", "llama3_1": "llama3_json", **{name: name.split()[0] for name in _MARKED},
}  # fmt: skip


@cache
def tokenizer():
    """The 256 bytes, and markers of all families; `<|im_end|>` ends an answer."""
    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = BackendTokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_MARKERS])
    end = backend.token_to_id("<|im_end|>")
    return Tokenizer(backend, SpecialTokens(bos="", eos="<|im_end|>", eos_token_ids=frozenset({end})))


@cache
def chat_template(family, **how):
    return ChatTemplate(source(family, **how), tokenizer(), name="tiny")
