"""A real template with tools, against transformers (see tests/make_tokenizer_fixtures.py), and templates in files."""

import json

import pytest
from helpers.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.chat_files import chat_template_from_directory, save_chat_template

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_conversations_with_tools_render_as_transformers_does(tiny, fixtures):
    reference = json.loads((fixtures / "chat_qwen3.json").read_text())
    template = ChatTemplate(reference["template"], tiny.tokenizer(), name="Qwen3")
    for case in reference["cases"]:
        assert template.render(case["messages"], **case["options"]) == case["text"]
    assert len(reference["cases"]) == 6


def read(path, tiny):
    return chat_template_from_directory(path, tiny.tokenizer(), name="Tiny")


def test_newer_files_win(tmp_path, tiny):
    assert read(tmp_path, tiny).templates == {}
    config = {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read(tmp_path, tiny).templates == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert read(tmp_path, tiny).templates == {"default": "c"}
    (tmp_path / "chat_template.jinja").write_text("d\n")
    assert read(tmp_path, tiny).templates == {"default": "d\n"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("e")
    assert read(tmp_path, tiny).render(HELLO) == "d"
    assert read(tmp_path, tiny).render(HELLO, tools=[TOOL]) == "e"


def test_several_templates_survive_saving(tmp_path, tiny):
    template = ChatTemplate({"default": "é\n", "tool_use": "b", "rag": "c"}, tiny.tokenizer(), name="Tiny")
    save_chat_template(template, tmp_path)
    assert read(tmp_path, tiny).templates == template.templates


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}', "neither a text nor texts by name"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "neither a text nor texts by name"),
        ("chat_template.json", b"{", "chat_template.json"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_damaged_template_files_are_named(tmp_path, tiny, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read(tmp_path, tiny)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gguf_may_hold_a_template_for_tools(tmp_path):
    more = {"tokenizer.chat_template.tool_use": "tools: {{ tools | length }}"}
    chat = open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf", metadata=more)).chat_template()
    assert chat.templates == {"default": CHAT_TEMPLATE, "tool_use": more["tokenizer.chat_template.tool_use"]}
    assert chat.render(HELLO, tools=[TOOL]) == "tools: 1"
