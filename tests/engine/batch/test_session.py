"""Batch runs, against an engine that finishes requests in an order the test chooses."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from helpers.batch_files import BatchFiles, chat_line, prompts
from helpers.fake_llm import FakeLLM
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.session import Batch
from twinmesh.engine.batch.summary import BatchResult
from twinmesh.engine.errors import BatchStopped


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


def run(files, lines, llm=None, **options):
    result = files.run(lines, llm, **options)
    return result, files.read()


def test_an_openai_chat_line_is_answered_in_openai_shape(files):
    _, (line,) = run(files, [chat_line("a", max_tokens=5)])
    assert line["custom_id"] == "a"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "\x01hi"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_a_plain_prompt_is_answered_as_a_text_completion_named_after_its_line(files):
    _, lines = run(files, ["", {"prompt": "one"}, {"prompt": [104, 105], "custom_id": "ids"}])
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert bodies.keys() == {"line-2", "ids"}
    assert bodies["line-2"]["object"] == "text_completion"
    assert bodies["line-2"]["model"] == str(files.model)
    assert bodies["line-2"]["choices"][0]["text"] == "one"
    assert bodies["ids"]["choices"][0]["text"] == "hi"


# ---- runs


def test_a_bad_line_becomes_an_error_line_and_the_run_goes_on(files):
    lines = ["not json", {"prompt": "x", "n": 0, "custom_id": "b"}, {"prompt": "y" * 51}, {"prompt": "good"}]
    result, written = run(files, lines)
    errors = {line["custom_id"]: line["error"] for line in written if line["error"]}
    assert {name: error["code"] for name, error in errors.items()} == {
        "line-1": "invalid_json_line",
        "b": "invalid_request",
        "line-3": "invalid_request",
    }
    assert errors["line-3"]["message"] == "line 3: The prompt is too long."
    assert all(line["response"] is None for line in written if line["error"])
    assert [line["custom_id"] for line in written if not line["error"]] == ["line-4"]
    assert (result.succeeded, result.failed) == (1, 3)


def test_sampling_that_does_not_go_with_the_model_is_an_error_line(files):
    _, written = run(files, [{"prompt": "x", "stop_token_ids": [2000]}, {"prompt": "good"}])
    assert [line["error"] is None for line in written] == [False, True]
    assert "does not have" in written[0]["error"]["message"]


def test_each_of_several_completions_is_a_choice(files):
    _, (line,) = run(files, [chat_line("a", n=2)])
    body = line["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 6


def test_tools_and_what_became_of_them_reach_the_chat_template(files):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "what time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    _, (line,) = run(files, [{"messages": messages, "tools": tools, "tool_choice": "auto"}])
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "\x01nownoon"


NOW = {"type": "function", "function": {"name": "now", "parameters": {}}}


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ({"tools": [NOW, NOW]}, "Tools 0 and 1 are both called 'now'"),
        ({"tools": [{"type": "function", "function": {}}]}, "Tool 0 has no name"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, "the function 'then'"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [{**NOW, "function": {"name": "now", "parameters": {"type": "text"}}}]}, "no JSON schema"),
        ({"tools": [NOW], "parallel_tool_calls": "no"}, "parallel_tool_calls='no'"),
    ],
)
def test_tools_that_cannot_be_called_are_an_error_of_their_line(files, asks, says):
    message = {"messages": [{"role": "user", "content": "x"}]}
    result, lines = run(files, [{**message, **asks}, message])
    refused, fine = sorted(lines, key=lambda line: line["custom_id"])
    assert refused["error"]["code"] == "invalid_request"
    assert says in refused["error"]["message"]
    assert (fine["error"], result.failed) == (None, 1)


def test_calls_of_a_line_have_the_same_ids_whenever_it_runs(files, tmp_path):
    llms, lines = [FakeLLM(), FakeLLM()], [chat_line("a"), chat_line("b"), chat_line("b2", "hi")]
    for llm in llms:
        files.run(lines, llm, restart=True)
    assert sorted(llms[0].answer_names) == sorted(llms[1].answer_names)
    assert len(set(llms[0].answer_names)) == 3


def test_what_a_line_says_of_its_rendering_reaches_the_chat_template(files):
    llm, options = FakeLLM(), {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    run(files, [chat_line("a", **options), chat_line("b")], llm)
    assert sorted(llm.chat_options, key=len) == [{}, options]


def test_variables_of_all_lines_give_way_to_those_of_a_line_and_belong_to_the_run(files):
    llm, lines = FakeLLM(), [chat_line("a", chat_template_kwargs={"x": 1, "y": None}), chat_line("b"), {"prompt": "c"}]
    run(files, lines, llm, chat_template_kwargs={"x": 0, "y": 0})
    used = [options["chat_template_kwargs"] for options in llm.chat_options]
    assert sorted(used, key=lambda each: each["x"]) == [{"x": 0, "y": 0}, {"x": 1, "y": 0}]
    run(files, lines, llm, chat_template_kwargs={"y": 0, "x": 0})
    for other, now in (({"x": 0}, "{'x': 0}"), (None, "None")):
        with pytest.raises(ValueError, match=rf"another run \(chat_template_kwargs={{.*}} instead of {now}\)"):
            run(files, lines, llm, chat_template_kwargs=other)


def test_an_effort_of_a_line_goes_before_that_of_all_lines(files):
    llm = FakeLLM()
    run(files, [chat_line("a", reasoning_effort="low")], llm, chat_template_kwargs={"reasoning_effort": "high"})
    assert llm.chat_options == [{"reasoning_effort": "low", "chat_template_kwargs": {}}]


def test_messages_that_the_template_refuses_are_an_error_line(files):
    _, (line,) = run(files, [{"messages": [{"role": "pirate", "content": "arr"}]}])
    assert line["error"]["message"] == "line 1: Message 0 must be the user's."


def test_a_request_that_failed_in_the_engine_is_an_error_line(files):
    result, written = run(files, [{"prompt": "bad"}, {"prompt": "good"}], FakeLLM(fail="bad"))
    assert {line["custom_id"]: line["error"] for line in written} == {
        "line-1": {"code": "request_failed", "message": "line 1: the mesh was lost."},
        "line-2": None,
    }
    assert (result.succeeded, result.failed) == (1, 1)


def test_at_most_window_requests_are_in_the_engine(files):
    llm = FakeLLM()
    run(files, [{"prompt": str(i)} for i in range(20)], llm, window=3)
    assert llm.most_in_flight == 3


def test_the_window_is_four_times_the_slots_where_none_is_given(files):
    llm = FakeLLM()
    run(files, [{"prompt": str(i)} for i in range(20)], llm)
    assert llm.most_in_flight == 8


def test_each_result_is_on_disk_before_the_next_is_waited_for(files):
    seen = []

    class Watching(FakeLLM):
        def output(self, index, ids, n=1):
            seen.append(len(files.read()))
            return super().output(index, ids, n)

    files.run(prompts(5), Watching(), window=2)
    assert seen == [0, 1, 2, 3, 4]


def test_results_come_as_they_finish_and_keep_their_names(files):
    _, written = run(files, [{"prompt": text, "custom_id": text} for text in "abc"], window=2)
    assert [line["custom_id"] for line in written] == ["b", "c", "a"]
    assert all(line["response"]["body"]["choices"][0]["text"] == line["custom_id"] for line in written)


def test_the_first_lines_are_kept_in_input_order(files):
    result, _ = run(files, ["bad", *({"prompt": text} for text in "abcd")], window=4, keep=2)
    assert [request.prompt for request, _ in result.kept] == ["a", "b"]


def test_text_in_any_script_survives(files):
    _, (line,) = run(files, [{"prompt": "日本語 🙂", "custom_id": "ü"}])
    assert line["custom_id"] == "ü"
    assert line["response"]["body"]["choices"][0]["text"] == "日本語 🙂"
    assert "日本語" in files.target.read_text(encoding="utf-8")


def test_a_lone_surrogate_does_not_end_the_run(files):
    _, (line,) = run(files, ['{"prompt": "a", "custom_id": "\\ud800"}'])
    assert line["custom_id"] == "\ud800"


def test_a_byte_order_mark_is_not_part_of_the_first_line(files):
    files.source.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n')
    files.run()
    assert [line["error"] for line in files.read()] == [None]


def test_figures_of_a_run_become_a_summary(files):
    result, _ = run(files, [{"prompt": "ab"}, {"prompt": "cde"}, "bad"])
    result.seconds = 36.0
    summary = result.summary(devices=2, device_hour_price=5.0)
    counted = {name: summary[name] for name in ("results", "succeeded", "failed", "resumed", "completion_tokens")}
    assert counted == {"results": 3, "succeeded": 2, "failed": 1, "resumed": 0, "completion_tokens": 5}
    assert summary["prefix_hit_rate"] == 0
    assert summary["dollars"] == pytest.approx(0.1)
    assert summary["dollars_per_million_tokens"] == pytest.approx(0.1 / 10 * 1e6)
    assert summary["dollars_per_million_completion_tokens"] == pytest.approx(0.1 / 5 * 1e6)
    assert summary["ttft"]["count"] == 2
    assert json.loads(json.dumps(summary)) == summary
    assert result.summary(devices=2)["dollars"] is None


# ---- ends


def test_ctrl_c_leaves_the_engine_and_keeps_what_is_written(files):
    llm = FakeLLM(interrupt_after=2)
    with pytest.raises(KeyboardInterrupt) as stop:
        files.run(prompts(9), llm, window=3)
    assert llm.was_left_with == 3
    assert len(files.read()) == 2
    assert stop.value.__notes__ == [f"2 of 9 results are in {files.target}; the same command goes on from there."]


def test_ctrl_c_before_a_written_line_is_counted_says_what_is_written(files, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchResult, "add", interrupt)
    with pytest.raises(KeyboardInterrupt) as stop:
        files.run(prompts(9), FakeLLM())
    assert len(files.read()) == 1
    assert stop.value.__notes__ == [f"1 of 9 results are in {files.target}; the same command goes on from there."]


def test_an_engine_that_ends_writes_nothing_off(files):
    class Ending(FakeLLM):
        def output(self, index, ids, n=1):
            if index == 1:
                self.is_closed, self.fail = True, ""
            return super().output(index, ids, n)

    with pytest.raises(BatchStopped, match=r"^the engine is closed.* 4 of 6 results are in .*; the same command"):
        files.run(prompts(6), Ending(), window=4)
    assert all(line["error"] is None for line in files.read())
    assert files.run().finished == 6


def test_a_failed_write_leaves_the_engine_and_says_so(files, monkeypatch):
    llm = FakeLLM()

    def full(fd, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(BatchStopped, match=r"no room .*No space left on device.*0 of 9 results are in"):
        files.run(prompts(9), llm, window=3)
    assert llm.was_left_with == 2


def test_a_run_checks_what_was_assigned_to_its_parameters_and_keeps_what_it_was_made_with(files):
    files.write([{"prompt": "one"}])
    params = SamplingParams()
    params.max_tokens = 8
    with Batch(files.source, files.target, model=files.model, defaults=params) as batch:
        params.max_tokens = -1
        batch.run(FakeLLM())
    assert [line["error"] for line in files.read()] == [None]
    with pytest.raises(ValueError, match="max_tokens=-1 is not usable"):
        Batch(files.source, files.target, model=files.model, defaults=params)


# ---- files


def open_batch(files, source=None, target=None):
    with Batch(source or files.source, target or files.target, model=files.model) as batch:
        return batch.total, batch.remaining


def test_lines_that_are_not_blank_are_counted_and_a_run_that_never_begins_leaves_nothing(files):
    files.source.write_text('{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert open_batch(files) == (2, 2)
    assert sorted(path.name for path in files.folder.iterdir()) == ["in.jsonl", "tiny.gguf"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_input_is_refused(files, content):
    files.source.write_text(content)
    with pytest.raises(ValueError, match=r"is empty: put one JSON request"):
        open_batch(files)
    assert not files.target.exists()


def test_files_that_cannot_be_used_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        open_batch(files)
    with pytest.raises(ValueError, match="not a regular file"):
        open_batch(files, source=tmp_path)
    files.write([{}])
    with pytest.raises(ValueError, match="is a directory"):
        open_batch(files, target=tmp_path)
    with pytest.raises(ValueError, match="does not exist: make it first"):
        open_batch(files, target=tmp_path / "missing" / "out.jsonl")
    with pytest.raises(ValueError, match="is the input file"):
        open_batch(files, target=files.source)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_batch(files, target=tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "is compressed with gzip: decompress it, or pipe it in with zcat"),
        (lzma.compress(b'{"prompt": "a"}'), "is compressed with xz"),
        (bz2.compress(b'{"prompt": "a"}'), "is compressed with bzip2"),
        (b"PAR1 and so on", r"is in Parquet: give it a name that ends in \.parquet"),
        ('{"prompt": "a"}'.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_not_each_of_its_lines(files, content, says):
    files.source.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_batch(files)


def test_an_output_without_permission_is_refused(files, monkeypatch):
    files.write([{}])
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, whom nothing is denied
    with pytest.raises(ValueError, match="permission denied"):
        open_batch(files)


def test_a_model_that_is_not_there_is_refused(files):
    files.write([{}])
    with pytest.raises(ValueError, match="There is no model"):
        Batch(files.source, files.target, model=files.folder / "missing.gguf")
    assert not files.target.exists()
