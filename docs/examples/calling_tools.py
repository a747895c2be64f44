"""Have a model call a function, and go on with what the function returns."""

import json
from typing import Any

from twinmesh import LLM, SamplingParams

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
# SmolLM2's own template takes no tools; this one writes tools and calls as Hermes and Qwen do. Of a model that was
# tuned on tools leave it out.
TEMPLATE = """{%- if tools %}<|im_start|>system
Call a function as <tool_call>
{"name": <name>, "arguments": <object>}
</tool_call>
{{ tools | tojson }}<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls %}<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def main() -> None:
    """Ask, call what the model wants called, and ask again."""
    with LLM("smollm2", max_model_len=512, max_num_seqs=4, prefill_buckets=(256,), decode_buckets=(4,)) as llm:
        chat: list[dict[str, Any]] = [{"role": "user", "content": "How warm is it in Oslo, in degrees Celsius?"}]
        params = SamplingParams(temperature=0, max_tokens=60)
        (output,) = llm.chat(chat, params, tools=[WEATHER], tool_choice="required", chat_template=TEMPLATE)
        (call,) = output.outputs[0].tool_calls or ()
        arguments = json.loads(call.arguments)
        print(f"{call.name} of {arguments['city']} in {arguments['unit']}")
        made = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        chat.append({"role": "assistant", "content": "", "tool_calls": [made]})
        chat.append({"role": "tool", "tool_call_id": call.id, "content": "7 degrees"})
        (output,) = llm.chat(chat, params, tools=[WEATHER], chat_template=TEMPLATE)
        print(f"answer: {output.outputs[0].content}")


if __name__ == "__main__":
    main()
