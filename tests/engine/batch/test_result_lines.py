"""Answers in output lines: in their parts where they are read into parts, else as text."""

from twinmesh.engine.api.outputs import CompletionOutput, RequestOutput
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.request_lines import BatchRequest
from twinmesh.engine.batch.result_lines import success_line
from twinmesh.engine.chat.answers import ToolCall
from twinmesh.engine.protocol.timeline import Timeline


def choice(*, reason="stop", **parts):
    """The choice of a chat line whose completion has these parts."""
    completion = CompletionOutput(0, "raw text", [1, 2], None, None, reason, None, Timeline(0.0), **parts)
    output = RequestOutput("r", None, [1], None, [completion], True)
    request = BatchRequest(1, "a", [{"role": "user", "content": "q"}], None, None, SamplingParams())
    return success_line(request, output, model="m", created=0, unique="u")["response"]["body"]["choices"][0]


def test_an_answer_that_is_not_read_is_its_text():
    assert choice()["message"] == {"role": "assistant", "content": "raw text"}


def test_an_answer_has_its_reasoning_beside_its_content():
    message = choice(reasoning="Hm.", content="Yes.", tool_calls=())["message"]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}


def test_a_call_is_written_as_openai_does():
    found = choice(reasoning="", content="", tool_calls=(ToolCall("call_1", "f", "{}"),))
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert found["message"] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert found["finish_reason"] == "tool_calls"


def test_a_call_that_was_cut_off_keeps_its_reason():
    found = choice(reason="length", reasoning="", content="", tool_calls=(ToolCall("1", "f", "{"),))
    assert found["finish_reason"] == "length"


def test_an_answer_that_is_cut_off_while_it_thinks_has_an_empty_content():
    message = choice(reason="length", reasoning="Hm", content="", tool_calls=())["message"]
    assert message == {"role": "assistant", "content": "", "reasoning": "Hm"}
