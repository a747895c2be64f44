"""Chat templates: rendering, ids, and what is refused."""

import pytest
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh.models.chat import ChatTemplate
from twinmesh.models.checkpoint import open_checkpoint
from twinmesh.models.errors import ChatTemplateError

HELLO = [{"role": "user", "content": "hi"}]


def template(tiny, source):
    return ChatTemplate(source, tiny.tokenizer(), name="Tiny")


def test_the_file_s_template_renders(tiny):
    chat = tiny.chat_template()
    assert chat.render(HELLO) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_special_tokens_become_ids_and_bos_is_not_doubled(tmp_path):
    path = write_tiny_gguf(tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    ids = open_checkpoint(path).chat_template().encode(HELLO)
    assert ids[0] == 1
    assert ids.count(1) == 2  # one per turn
    assert ids.count(2) == 1


def test_blocks_are_trimmed_and_extras_exist(tiny):
    source = "{% if true %}\n  {{ messages | tojson }}\n{% endif %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    assert template(tiny, source).render([{"role": "user", "content": "<é>"}]) == (
        '  [{"role": "user", "content": "<é>"}]\n4<|im_end|>'
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "Tiny has no chat template"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate."),
        ("{% for %}", "failed"),
        ("{{ messages[0].content.nothing() }}", "failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ [] | unknown_filter }}", "unknown_filter"),
    ],
)
def test_templates_fail_in_one_sentence(tiny, source, says):
    with pytest.raises(ChatTemplateError, match="Tiny") as caught:
        template(tiny, source).render(HELLO)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ({"role": "user", "content": "hi"}, "non-empty list"),
        ([*HELLO, "hi"], "Message 1 is of type str"),
        ([{"role": "user"}], "Message 0 needs a string under 'content'"),
        ([{"role": None, "content": "hi"}], "under 'role'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "under 'content'"),
    ],
)
def test_other_forms_of_messages_are_refused(tiny, messages, says):
    with pytest.raises(ChatTemplateError, match=says):
        tiny.chat_template().render(messages)


def test_a_file_without_a_template_opens_and_refuses_to_chat(tmp_path):
    path = write_tiny_gguf(tmp_path / "plain.gguf", metadata={"tokenizer.chat_template": None})
    chat = open_checkpoint(path).chat_template()
    with pytest.raises(ChatTemplateError, match="Tiny Llama has no chat template"):
        chat.encode(HELLO)
