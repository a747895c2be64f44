"""Conversations reach templates in the form that each takes, and nothing that was said is lost on the way."""

import json
from types import SimpleNamespace

import pytest
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate

LOOP = "{% for m in messages %}BODY{% endfor %}"
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
ASK = {"role": "user", "content": "w?"}


@pytest.fixture
def chat(tiny):
    """Make a template of what it does with each message."""
    return lambda body: ChatTemplate(LOOP.replace("BODY", body), tiny.tokenizer(), name="Tiny")


def called(arguments, **fields):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


# ---- arguments of tool calls

CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}[CALL]{% endfor %}"
TO_JSON = CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments | tojson }}")
ITEMS = CALLS.replace("CALL", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }},{% endfor %}")
AS_TEXT = CALLS.replace("CALL", "{{ c.function.name + ' ' + c.function.arguments }}")


@pytest.mark.parametrize(
    ("arguments", "as_json", "as_items"),
    [
        ('{"city": "Orléans", "days": 2}', '{"city": "Orléans", "days": 2}', "city=Orléans,days=2,"),
        ({"city": "Oslo"}, '{"city": "Oslo"}', "city=Oslo,"),
        ('{"at": {"x": [1, null]}}', '{"at": {"x": [1, null]}}', "at={'x': [1, None]},"),
        ('{"q": "a \\"b\\" <c>"}', '{"q": "a \\"b\\" <c>"}', 'q=a "b" <c>,'),
        ("{}", "{}", ""),
        ("", "{}", ""),
        ("  \n", "{}", ""),
        ("null", "{}", ""),
        (None, "{}", ""),
        (' {"n": 1}\n', '{"n": 1}', "n=1,"),
    ],
)
def test_arguments_that_are_json_text_become_objects(chat, arguments, as_json, as_items):
    messages = [ASK, called(arguments), {"role": "tool", "content": "7"}]
    assert chat(TO_JSON).render(messages) == f"w?[f {as_json}]7"
    assert chat(ITEMS).render(messages) == f"w?[{as_items}]7"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"city": ', "Message 1, tool call 0, of 'f', has 'arguments' that are not JSON"),
        ("city=Oslo", "are not JSON"),
        ("[" * 100_000, "are not JSON"),
        ("[1]", "'arguments' that are not an object"),
        ("42", "'arguments' that are not an object"),
        ('"Oslo"', "'arguments' that are not an object"),
        ([1], "'arguments' that are not an object"),
    ],
)
def test_arguments_that_are_no_object_are_refused(chat, arguments, says):
    with pytest.raises(ChatTemplateError, match=says):
        chat(TO_JSON).render([ASK, called(arguments)])


def test_templates_that_write_arguments_as_they_are_get_json(chat):
    """DeepSeek's do: '```json' + arguments."""
    assert chat(AS_TEXT).render([ASK, called('{"city":"Orléans"}')]) == 'w?[f {"city": "Orléans"}]'


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}, "tool call 0, is of type 'custom'"),
        ({"id": "c", "type": "mcp"}, "is of type 'mcp'"),
        ({"id": "c", "type": "function"}, "needs {'function'"),
        ({"id": "c", "function": {"arguments": "{}"}}, "needs {'function'"),
        ({"id": "c", "function": "f"}, "needs {'function'"),
        ({"id": "c", "function": {"name": None}}, "needs {'function'"),
    ],
)
def test_calls_of_anything_but_functions_are_refused(chat, call, says):
    with pytest.raises(ChatTemplateError, match=f"Message 1, {says}|{says}"):
        chat(TO_JSON).render([ASK, {"role": "assistant", "content": None, "tool_calls": [call]}])


def test_calls_of_streams_and_of_transformers_are_taken(chat):
    streamed = {"index": 0, "id": None, "type": None, "function": {"name": "f", "arguments": '{"n": 1}'}}
    flat = {"name": "f", "arguments": '{"n": 1}'}
    both = CALLS.replace("CALL", "{% set c = c.function or c %}{{ c.name }}{{ c.arguments.n }}")
    for call in (streamed, flat):
        assert chat(both).render([{"role": "assistant", "content": "", "tool_calls": [call]}]) == "[f1]"


def test_calls_are_refused_where_a_template_would_leave_them_out(chat):
    message = called('{"n": 1}', content="Let me see.")
    first_only = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
    for body, calls in (
        ("{{ m.role }}{{ m.content }}", message["tool_calls"]),
        ("{{ m.content }}{% if m.tool_calls and m.content is none %}{{ m.tool_calls | tojson }}{% endif %}", None),
        (first_only, message["tool_calls"] * 2),
    ):
        said = {**message, "tool_calls": calls or message["tool_calls"]}
        with pytest.raises(ChatTemplateError, match="of Tiny leaves out the tool calls of message 1"):
            chat(body).render([ASK, said])
    assert chat(first_only).render([ASK, message]) == "w?Let me see.f"


def test_templates_that_ask_for_no_content_beside_calls_get_none(chat):
    body = "{% if m.content is none %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
    assert json.loads(chat(body).render([called("{}")])) == called({})["tool_calls"]
    assert json.loads(chat(body).render([called("{}", tool_calls=called("{}")["tool_calls"] * 2)]))[1]["id"] == "c"


def test_a_template_may_leave_out_the_words_beside_a_call(chat):
    """Llama 3.1's does: the model was tuned on calls alone."""
    body = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    assert chat(body).render([ASK, called("{}", content="Let me see.")]) == "w?f"


def test_the_older_form_of_a_call_and_its_result_are_those_of_a_tool(chat):
    messages = [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}},
        {"role": "function", "name": "f", "content": "7"},
    ]
    assert chat(TO_JSON).render(messages) == 'w?[f {"n": 1}]7'
    by_role = (
        "{% if m.role in ('user', 'assistant') %}" + TO_JSON + "{% elif m.role == 'tool' %}<{{ m.content }}>{% endif %}"
    )
    assert chat(by_role).render(messages) == 'w?[f {"n": 1}]<7>'
    assert chat("{{ m.role }}:" + TO_JSON + ";").render(messages) == 'user:w?;assistant:[f {"n": 1}];function:7;'
    with pytest.raises(ChatTemplateError, match="has both 'tool_calls' and 'function_call'"):
        chat(TO_JSON).render([called("{}", function_call={"name": "f", "arguments": "{}"})])


# ---- content in parts


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{{ m.content }}", "one\ntwo"),
        ("{{ m['content'] | trim }}", "one\ntwo"),
        ("{{ m.content | tojson }}", '"one\\ntwo"'),
        ("{{ m.content | upper }}", "ONE\nTWO"),
        ("{{ m.content | title }}", "One\nTwo"),
        ("{{ m.content | e }}", "one\ntwo"),
        ("{{ m.content | string }}", "one\ntwo"),
        ("{{ m.content | join }}", "one\ntwo"),
        ("{{ m.content | list | join('') }}", "one\ntwo"),
        ("{{ '%s' | format(m.content) }}", "one\ntwo"),
        ("{{ m.content ~ '!' }}", "one\ntwo!"),
        ("{{ 'x' + m.content }}", "xone\ntwo"),
        ("{{ m.content.split('</think>')[-1] }}", "one\ntwo"),
        ("{{ m.content.strip() }}", "one\ntwo"),
        ("{{ m | tojson }}{{ m.content }}", '{"role": "user", "content": "one\\ntwo"}one\ntwo'),
        ("{{ m.content if m.content is string }}", "one\ntwo"),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", "one\ntwo"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}", "one\ntwo"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[-1]['text'] }}{% endif %}", "one\ntwo"),
        ("{% if m.content is not string %}{{ raise_exception('strings only') }}{% endif %}{{ m.content }}", "one\ntwo"),
        ("{% for p in m.content %}[{{ p.text }}]{% endfor %}", "[one][two]"),
        ("{% for p in m.content %}{% if p.type == 'text' %}{{ p['text'] | trim }}{% endif %}{% endfor %}", "onetwo"),
        ("{{ m.content | map(attribute='text') | join(' ') }}", "one two"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}", "(one)(two)"),  # noqa: E501
        ("{{ m.content[0].text }}+{{ m.content[1].text }}", "one+two"),
    ],
)  # fmt: skip
def test_content_in_parts_goes_as_parts_or_joined(chat, body, text):
    assert chat(body).render([{"role": "user", "content": PARTS}]) == text


def test_a_text_goes_as_a_part_where_a_template_takes_parts_only(chat):
    body = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"
    assert chat(body).render([ASK, {"role": "assistant", "content": PARTS}]) == "[w?][one][two]"


def test_parts_of_responses_and_refusals_are_text(chat):
    parts = [
        {"type": "output_text", "text": "a", "annotations": None},
        {"type": "input_text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
        {"type": "text", "text": "d", "cache_control": {"type": "ephemeral"}},
    ]
    assert chat("{{ m.content }}").render([{"role": "assistant", "content": parts}]) == "a\nb\nc\nd"
    text = chat("{% for p in m.content %}{{ p.type }}:{{ p.text }};{% endfor %}").render(
        [{"role": "assistant", "content": parts}]
    )
    assert text == "text:a;text:b;text:c;text:d;"


def test_parts_of_a_tool_are_joined(chat):
    parts = "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    takes_parts = "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
    assert chat(takes_parts).render([{"role": "tool", "content": PARTS}]) == "one\ntwo"


def test_empty_and_blank_contents_are_what_they_are(chat):
    assert chat("<{{ m.content }}>").render([{"role": "user", "content": []}]) == "<>"
    blank = [{"type": "text", "text": " "}, {"type": "text", "text": "x"}]
    assert chat("<{{ m.content }}>").render([{"role": "user", "content": blank}]) == "< \nx>"
    assert chat("<{{ m.content }}>").render([{"role": "user", "content": ""}]) == "<>"


def test_parts_may_be_mixed_with_texts(chat):
    """Gemma 3's template takes parts from users and the first part alone from the system."""
    body = (
        "{% if m.content is string %}{{ m.content }}{% elif m.role == 'system' %}{{ m.content[0].text }}"
        "{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %};"
    )
    user = {"role": "user", "content": PARTS}
    assert chat(body).render([{"role": "system", "content": "S"}, user]) == "S;[one][two];"
    assert chat(body).render([{"role": "system", "content": PARTS}, user]) == "one\ntwo;one\ntwo;"


# ---- roles

KNOWN = "{% if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"


@pytest.mark.parametrize("role", ["User", "human", "model", "ipython", "critic", "tool", "function", " user", ""])
def test_a_role_without_a_branch_is_refused_by_name(chat, role):
    with pytest.raises(ChatTemplateError, match=f"Tiny leaves out message 1 \\(role {role!r}\\)"):
        chat(KNOWN).render([ASK, {"role": role, "content": "SAY IT"}, ASK])


def test_a_role_is_refused_where_a_template_has_no_place_for_it(chat, tiny):
    first = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    rest = "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}"
    template = ChatTemplate(first + rest, tiny.tokenizer(), name="Tiny")
    assert template.render([{"role": "system", "content": "S"}, ASK]) == "S<w?>"
    with pytest.raises(ChatTemplateError, match="leaves out message 2 \\(role 'system'\\)"):
        template.render([{"role": "system", "content": "S"}, ASK, {"role": "system", "content": "T"}, ASK])
    with pytest.raises(ChatTemplateError, match="leaves out message 0 \\(role 'system'\\)"):
        ChatTemplate(rest, tiny.tokenizer(), name="Tiny").render([{"role": "system", "content": "S"}, ASK])


def test_roles_that_a_template_writes_as_they_are_are_taken(chat):
    assert chat("<{{ m.role }}>{{ m.content }}").render([{"role": "critic", "content": "x"}]) == "<critic>x"


def says(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([says("developer", "D"), ASK], "<system>D<user>w?"),
        ([says("developer", PARTS), ASK], "<system>one\ntwo<user>w?"),
        ([says("system", "S"), says("developer", "D"), ASK], "<system>S\n\nD<user>w?"),
        ([ASK, says("assistant", "A"), says("developer", "D"), ASK], "<system>D<user>w?<assistant>A<user>w?"),
        ([says("developer", "D"), ASK, says("system", PARTS)], "<system>D\n\none\ntwo<user>w?"),
        ([says("system", "S"), ASK, says("system", "T")], "<system>S<user>w?<system>T"),
    ],
)
def test_developer_is_system_where_the_template_does_not_know_it(chat, messages, text):
    assert chat(KNOWN).render(messages) == text


def test_developer_stays_where_the_template_knows_it(chat):
    body = KNOWN.replace("'user',", "'user', 'developer',")
    assert chat(body).render([says("developer", "D"), ASK]) == "<developer>D<user>w?"


def test_errors_name_messages_as_they_were_given(chat):
    with pytest.raises(ChatTemplateError, match="leaves out message 3 \\(role 'human'\\)"):
        chat(KNOWN).render([says("system", "S"), ASK, says("developer", "D"), says("human", "x")])


def test_a_template_s_own_words_go_first(chat):
    body = "{% if m.role == 'system' %}{{ raise_exception('System role not supported!') }}{% endif %}{{ m.content }}"
    for message in (says("system", "S"), says("developer", "D"), says("system", PARTS)):
        with pytest.raises(ChatTemplateError, match=r"Tiny failed: System role not supported!$"):
            chat(body).render([message, ASK])


# ---- reasoning, refusals and what else a response holds


@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("given", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_three_names_that_mean_the_same(chat, read, given):
    message = {"role": "assistant", "content": "4", given: "2 and 2"}
    for how in (f"m.{read}", f"m['{read}']", f"m.get('{read}', '')"):
        assert chat(f"<{{{{ {how} }}}}>{{{{ m.content }}}}").render([message]) == "<2 and 2>4"


def test_reasoning_is_not_written_where_a_template_does_not_ask_for_it(chat):
    message = {"role": "assistant", "content": "4", "reasoning": "2 and 2"}
    assert chat("{{ m.content }}").render([message]) == "4"
    assert json.loads(chat("{{ m | tojson }}").render([message])) == message


def test_reasoning_that_contradicts_itself_or_is_no_answer_s_is_refused(chat):
    body = "{{ m.thinking }}{{ m.content }}"
    same = {"role": "assistant", "content": "4", "reasoning": "a", "reasoning_content": "a", "thinking": ""}
    assert chat(body).render([same]) == "a4"
    for fields, complaint in (
        ({"reasoning": "a", "thinking": "b"}, "different texts under 'reasoning' and 'thinking'"),
        ({"reasoning": ["a"]}, "'reasoning' in message 0 must be a text"),
        ({"thinking": True}, "'thinking' in message 0 must be a text"),
        ({"role": "user", "reasoning_content": "a"}, "in a message of the assistant's"),
    ):
        with pytest.raises(ChatTemplateError, match=complaint):
            chat(body).render([{"role": "assistant", "content": "4", **fields}])


def test_an_answer_that_was_cut_off_while_thinking_has_an_empty_content(chat):
    message = {"role": "assistant", "content": None, "reasoning": "2 and"}
    assert chat("<{{ m.reasoning }}>{{ m.content }}").render([message]) == "<2 and>"


def test_a_refusal_is_what_was_said(chat):
    for content in (None, "", []):
        message = {"role": "assistant", "content": content, "refusal": "I will not."}
        assert chat("{{ m.content }}").render([message]) == "I will not."
    with pytest.raises(ChatTemplateError, match="both 'content' and 'refusal'"):
        chat("{{ m.content }}").render([{"role": "assistant", "content": "x", "refusal": "y"}])
    with pytest.raises(ChatTemplateError, match="a 'refusal' that is not a string"):
        chat("{{ m.content }}").render([{"role": "assistant", "content": None, "refusal": 3}])


def test_fields_that_hold_nothing_and_places_in_the_text_are_gone(chat):
    empty = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "name": None}
    places = [{"type": "url_citation", "url_citation": {"url": "x", "title": "y", "start_index": 0, "end_index": 1}}]
    body = "{{ m | tojson }}"
    for fields in (empty, {"annotations": []}, {"annotations": places}, {"tool_calls": []}):
        text = chat(body).render([{"role": "assistant", "content": "4", **fields}])
        assert json.loads(text) == {"role": "assistant", "content": "4"}


def test_audio_is_refused_by_name(chat):
    audio = {"id": "a", "data": "AAAA", "expires_at": 1, "transcript": "four"}
    with pytest.raises(ChatTemplateError, match="Message 1 has 'audio': only text is supported"):
        chat("{{ m.content }}").render([ASK, {"role": "assistant", "content": None, "audio": audio}])


def test_objects_of_openai_s_client_are_taken(chat):
    """They are pydantic's; what they hold is what `model_dump` says."""

    def held(**fields):
        return SimpleNamespace(model_dump=lambda: fields)

    function = {"name": "f", "arguments": '{"n": 1}'}
    call = {"id": "c", "type": "function", "function": function}
    answer = held(role="assistant", content=None, refusal=None, annotations=[], audio=None, tool_calls=[call])
    part = {"role": "assistant", "content": "", "tool_calls": [held(**call)]}
    for message in (answer, part):
        assert chat(TO_JSON).render([ASK, message]) == 'w?[f {"n": 1}]'
    with pytest.raises(ChatTemplateError, match="Message 0 is of type SimpleNamespace, expected a dict"):
        chat(TO_JSON).render([SimpleNamespace(model_dump=lambda: "x")])


def test_what_a_template_asks_of_fields_is_found_out_anew_for_other_fields(chat):
    """One conversation in which a template writes everything says nothing of the next one."""
    nested = called({"n": 1}, content="")
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"n": 1}}]}
    untyped = called({"n": 1}, content="", tool_calls=[{"function": {"name": "f", "arguments": {"n": 1}}}])
    for body, shown, lost in (
        (CALLS.replace("CALL", "{{ (c.function or {}).name }}"), nested, bare),
        (CALLS.replace("CALL", "{{ c.name }}"), bare, nested),
        (CALLS.replace("[CALL]", "{% if c.type == 'function' %}{{ c.function.name }}{% endif %}"), nested, untyped),
        (
            "{% if m.thinking %}{{ m.thinking }}{% else %}{{ m.content }}{% endif %}",
            {"role": "assistant", "content": "4", "thinking": ""},
            {"role": "assistant", "content": "4", "thinking": "2 and 2"},
        ),
        (
            "{% if not m.name %}{{ m.content }}{% endif %}",
            {"role": "user", "content": "a", "name": " "[:0]},
            {"role": "user", "content": "a", "name": "Ann"},
        ),
        (
            "{% if m.prefix is not true %}{{ m.content }}{% endif %}",
            {"role": "assistant", "content": "a", "prefix": False},
            {"role": "assistant", "content": "a", "prefix": True},
        ),
    ):
        template = chat(body)
        template.render([ASK, shown])
        for _ in range(2):
            with pytest.raises(ChatTemplateError, match=r"leaves out (the tool calls of )?message 1"):
                template.render([ASK, lost])
        template.render([ASK, shown])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{{ m | tojson }}", '{"role": "user", "content": "one\\ntwo"}'),
        ("{{ m.values() | join(': ') }}", "user: one\ntwo"),
        ("{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}", "role=user;content=one\ntwo;"),
        ("{{ m }}", "{'role': 'user', 'content': 'one\\ntwo'}"),
        ("{{ m | dictsort | map('last') | join('|') }}", "one\ntwo|user"),
        ("{{ m | string | upper }}", "{'ROLE': 'USER', 'CONTENT': 'ONE\\NTWO'}"),
        ("{% set k = m | list | last %}{{ m[k] }}", "one\ntwo"),
    ],
)
def test_templates_that_write_whole_messages_get_texts(chat, body, text):
    assert chat(body).render([{"role": "user", "content": PARTS}]) == text


def test_a_template_that_reads_no_content_is_left_alone(chat):
    assert chat("{{ m.role }};").render([ASK, {"role": "critic", "content": PARTS}]) == "user;critic;"


def test_what_is_given_is_not_changed(chat):
    messages = [ASK, called('{"n": 1}', reasoning="r", annotations=[])]
    before = json.dumps(messages)
    chat("{{ m.thinking }}" + TO_JSON).render(messages)
    assert json.dumps(messages) == before
