"""Answers that keep to grammars, through whole engines: whatever happens to a request, its answer is the grammar's.

The tiny model's weights are random, so nothing but the grammar makes an answer a good one.
"""

import json
import re

import jsonschema
import pytest
from helpers.batch_files import BatchFiles
from helpers.core_engine import Watch, disturb, executor_of
from twinmesh import SamplingParams, StructuredOutputsParams
from twinmesh.engine.protocol.actions import Decode, Prefill

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
DATE = StructuredOutputsParams(regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
HOT = dict(temperature=1.0, max_tokens=90)
PROMPTS = ["The cat", "On the other hand, " * 3, "a", "in the end there was only the sea " * 2]
KINDS = {
    "greedy": dict(temperature=0.0, structured_outputs=JSON),
    "sampled": dict(temperature=1.3, top_p=0.95, seed=7, structured_outputs=JSON),
    "penalties": dict(
        temperature=0.9, seed=3, repetition_penalty=1.2, presence_penalty=0.4, min_tokens=5, logit_bias={5: 2.0},
        structured_outputs=DATE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(make_llm):
    """Prefill on one mesh, decode on two; deterministic, so that its programs are those of `test_determinism.py`."""
    with make_llm("prefill=1,decode=2", deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        yield llm


@pytest.fixture(scope="module")
def both(make_llm):
    with make_llm("both=1") as llm:
        yield llm


def check(text, params=JSON):
    if params is JSON:
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch(params.regex, text)


@pytest.mark.parametrize("params", [JSON, DATE, StructuredOutputsParams(choice=["yes", "no", "perhaps"])])
def test_completions_drawn_by_chance_keep_to_what_is_asked_for(both, params):
    (output,) = both.generate("Once", SamplingParams(n=4, seed=1, structured_outputs=params, **HOT))
    for completion in output.outputs:
        assert completion.finish_reason == "stop"
        assert completion.token_ids[-1] in both.tokenizer.eos_token_ids
        if params.kind == "choice":
            assert completion.text in params.choice
        else:
            check(completion.text, params)
    assert len({completion.text for completion in output.outputs}) > 1


def test_free_requests_beside_one_with_a_grammar_give_what_they_give_alone(both):
    free = [SamplingParams(temperature=0, max_tokens=20), SamplingParams(temperature=1.0, seed=2, max_tokens=20)]
    alone = [both.generate("The cat", one)[0].outputs[0].token_ids for one in free]
    grammar = SamplingParams(seed=1, structured_outputs=JSON, **HOT)
    together = both.generate(["The cat"] * 3, [*free, grammar])
    assert [output.outputs[0].token_ids for output in together[:2]] == alone
    check(together[2].outputs[0].text)


def test_nothing_compiles_once_the_first_such_request_has_been_checked(both):
    both.check_request("a", SamplingParams(structured_outputs=DATE))
    before = both.metrics().compiles
    both.generate(["a", "b"], [SamplingParams(structured_outputs=DATE, **HOT), SamplingParams(max_tokens=20)])
    assert both.metrics().compiles == before


def test_an_engine_that_is_never_asked_has_compiled_nothing_for_masks(make_llm):
    with make_llm("both=1") as llm:
        llm.generate("a", SamplingParams(max_tokens=3))
        meshes = executor_of(llm).meshes
        assert [mesh.programs.allow for mesh in meshes] == [{}]
        llm.generate("a", SamplingParams(max_tokens=3, structured_outputs=DATE))
        assert all(mesh.programs.allow.keys() == {*mesh.plan.config.decode_buckets, 8} for mesh in meshes)


class Ahead(Watch):
    """Which requests had a decode row dispatched while their token before it was not read."""

    def __init__(self):
        super().__init__()
        self.rows, self.ahead, self.steps = set(), set(), []

    def decided(self, scheduler, actions):
        super().decided(scheduler, actions)
        for action in actions:
            if isinstance(action, Decode):
                self.steps.append({row.request_id for row in action.rows})
            for row in action.rows if isinstance(action, Decode) else ():
                self.rows.add(row.request_id)
                request = scheduler.requests.get(row.request_id)
                if request is not None and row.kv_len > request.prompt_len + request.confirmed:
                    self.ahead.add(row.request_id)


def test_only_free_requests_run_ahead_and_steps_are_shared(both):
    watch = Ahead()
    with both.engine.core.observe(watch):
        free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        both.generate(["a", "b", "c"], [SamplingParams(structured_outputs=JSON, **HOT), free, free])
    constrained = min(watch.rows)
    assert watch.ahead == watch.rows - {constrained}
    assert any(constrained in step and len(step) > 1 for step in watch.steps)
    assert any(constrained not in step for step in watch.steps)


def test_requests_that_do_not_run_ahead_take_their_steps_together(both):
    watch = Ahead()
    with both.engine.core.observe(watch):
        both.generate(["a", "b " * 20, "c"], SamplingParams(temperature=0, max_tokens=30, structured_outputs=JSON))
    assert not watch.ahead
    assert max(map(len, watch.steps)) == 3
    together = [step for step in watch.steps if len(step) == 3]
    assert len(together) > 15


def test_decode_steps_at_once_are_for_requests_that_run_ahead(make_llm):
    params = [SamplingParams(temperature=0, max_tokens=30, structured_outputs=JSON)] * 2
    free = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)] * 2
    with make_llm("both=1") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(["a", "b"] * 2, params + free)]
    with make_llm("both=1", decode_steps=4) as llm:
        watch = Watch()
        with llm.engine.core.observe(watch):
            found = [output.outputs[0].token_ids for output in llm.generate(["a", "b"] * 2, params + free)]
            llm.generate("a", free[0])
    assert found == expected
    assert {action.steps for action in watch.seen if isinstance(action, Decode)} == {1, 4}


# ---- what happens to requests


def sampling(kind):
    return SamplingParams(max_tokens=60, logprobs=1, **KINDS[kind])


def facts(output):
    completion = output.outputs[0]
    scores = [{token: logprob.logprob for token, logprob in step.items()} for step in completion.logprobs]
    return completion.token_ids, completion.finish_reason, scores


@pytest.fixture(scope="module")
def expected(make_llm):
    """Each prompt alone on an engine that nothing disturbs."""
    with make_llm("both=1", deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        found = {}
        for kind in KINDS:
            for prompt in PROMPTS:
                (output,) = llm.generate(prompt, sampling(kind))
                check(output.outputs[0].text, KINDS[kind]["structured_outputs"])
                found[kind, prompt] = facts(output)
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [None, "preempt", "migrate"])
def test_handed_off_preempted_or_migrated_a_request_gives_the_same_bits(engine, expected, kind, how):
    before = engine.metrics()
    streams = [engine.stream(prompt, sampling(kind)) for prompt in PROMPTS]
    results = [disturb(engine, stream, how, (2, 6)) if how else stream.result() for stream in streams]
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert facts(result) == expected[kind, prompt]
    after = engine.metrics()
    assert after.preemptions > before.preemptions or how != "preempt"
    assert after.migrations > before.migrations or how != "migrate"


def test_a_lost_mesh_changes_no_answer(engine, expected):
    # Whichever mesh decodes: where requests go hangs on how fast they come.
    programs, calls = [mesh.programs for mesh in executor_of(engine).meshes if mesh.plan.spec.decodes], []

    def sometimes(step):
        def run(*arguments):
            calls.append(None)
            if len(calls) in (3, 15):
                raise RuntimeError("the device is on fire")
            return step(*arguments)

        return run

    kept, before = [program.decode for program in programs], engine.metrics().retries
    for program in programs:
        program.decode = {size: sometimes(step) for size, step in program.decode.items()}
    try:
        results = engine.generate(PROMPTS, sampling("sampled"))
    finally:
        for program, decode in zip(programs, kept, strict=True):
            program.decode = decode
    assert engine.metrics().retries > before
    assert [facts(result) for result in results] == [expected["sampled", prompt] for prompt in PROMPTS]


def test_without_deterministic_mode_an_answer_that_is_disturbed_is_still_the_grammars(both):
    for seed in range(3):
        stream = both.stream("a", SamplingParams(seed=seed, structured_outputs=JSON, **HOT))
        check(disturb(both, stream, "preempt", (2, 6)).outputs[0].text)


# ---- with other parameters


def test_behind_reasoning_all_is_free_and_then_the_grammar_begins(both):
    (end,) = both.tokenizer.encode(">", add_special=False)
    behind = StructuredOutputsParams(regex="[0-9]{3}", after=">")
    hot = dict(temperature=20.0, max_tokens=100, skip_special_tokens=False)
    outputs = both.generate("a", SamplingParams(n=4, seed=0, logit_bias={end: 60.0}, structured_outputs=behind, **hot))[
        0
    ].outputs
    assert {output.finish_reason for output in outputs} == {"stop"}
    for output in outputs:
        _before, _, answer = output.text.partition(">")
        assert re.fullmatch(r"[0-9]{3}", answer), output.text
        assert not set(output.token_ids[:-1]) & both.tokenizer.eos_token_ids
    assert any(output.text.index(">") > 0 for output in outputs)


def test_reasoning_that_the_prompt_has_ended_leaves_the_grammar_alone(both):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[0-9]{3}", after="</think>"))
    (output,) = both.generate("<think>\n\n</think>\n\n", params)
    assert re.fullmatch("[0-9]{3}", output.outputs[0].text)


def test_a_stop_string_cuts_an_answer_as_ever(both):
    params = SamplingParams(structured_outputs=DATE, stop=["-"], **HOT)
    (output,) = both.generate("a", params)
    assert re.fullmatch("[0-9]{4}", output.outputs[0].text)
    assert output.outputs[0].stop_reason == "-"


def test_an_answer_that_is_cut_by_its_length_says_so(both):
    (output,) = both.generate("a", SamplingParams(structured_outputs=JSON, max_tokens=4))
    assert output.outputs[0].finish_reason == "length"
    assert '{"kind":"'.startswith(output.outputs[0].text[:9])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"ignore_eos": True}, "leave ignore_eos out"),
        ({"allowed_token_ids": [1]}, "leave one of the two out"),
        ({"logit_bias": {3: float("-inf")}}, "use a bias such as -100"),
    ],
)
def test_parameters_that_do_not_go_with_a_grammar_are_refused(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(structured_outputs=DATE, **more)


def test_a_dict_in_place_of_the_parameters_is_refused():
    with pytest.raises(ValueError, match="it must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_what_cannot_be_kept_to_is_refused_before_anything_of_a_list_runs(both):
    before = both.engine.core.metrics().prompt_tokens
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(json={"uniqueItems": True}))
    with pytest.raises(ValueError, match="'uniqueItems' at the top"):
        both.generate(["a", "b"], [SamplingParams(), bad])
    with pytest.raises(ValueError, match="'uniqueItems' at the top"):
        both.check_sampling_params(bad)
    assert both.engine.core.metrics().prompt_tokens == before


def test_a_grammar_that_cannot_be_followed_fails_its_request_alone_with_the_reason(both, monkeypatch):
    from twinmesh.engine.structured.matcher import Matcher

    monkeypatch.setattr(Matcher, "failure", property(lambda self: "the grammar is too much: simplify it."))
    outputs = both.generate(["a", "b"], [SamplingParams(structured_outputs=DATE), SamplingParams(max_tokens=5)])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert outputs[0].error == "the grammar is too much: simplify it."


def test_prefill_steps_carry_masks_too(both):
    watch = Watch()
    with both.engine.core.observe(watch):
        (output,) = both.generate("a", SamplingParams(max_tokens=1, structured_outputs=DATE))
    assert re.fullmatch("[0-9]+", output.outputs[0].text)
    assert [type(action) for action in watch.seen if isinstance(action, Prefill | Decode)] == [Prefill]


def test_lines_of_a_batch_keep_to_their_schemas_and_one_that_cannot_is_an_error_line(make_llm, tmp_path):
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "age", "schema": {"type": "integer", "maximum": 99, "minimum": 9}},
    }
    bad = {"type": "json_schema", "json_schema": {"name": "set", "schema": {"type": "array", "uniqueItems": True}}}
    files = BatchFiles(tmp_path)
    with make_llm("both=1") as llm:
        files.run(
            [
                {"prompt": "a", "custom_id": "good", "response_format": schema},
                {"prompt": "a", "custom_id": "bad", "response_format": bad},
                {"prompt": "a", "custom_id": "chosen", "structured_outputs": {"choice": ["yes", "no"]}},
            ],
            llm,
            defaults=SamplingParams(max_tokens=20),
        )
    lines = {line["custom_id"]: line for line in files.read()}
    text = {name: line["response"]["body"]["choices"][0]["text"] for name, line in lines.items() if line["response"]}
    assert text["chosen"] in ("yes", "no")
    assert 9 <= int(text["good"]) <= 99
    assert lines["bad"]["response"] is None
    assert (
        "line 2: structured_outputs.json has the keyword 'uniqueItems' at the top" in lines["bad"]["error"]["message"]
    )
