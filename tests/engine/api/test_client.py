"""What callers see of the engine's updates, and what the engine sees of callers, without an engine."""

import inspect
import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers.fake_core import CONFIG, FakeCore, make_fake, scores
from twinmesh import LLM, AsyncLLM, EngineError, Logprob, SamplingParams
from twinmesh.engine.paging.block_hash import block_hashes, salted
from twinmesh.engine.protocol.actions import Accept
from twinmesh.engine.protocol.cache_report import PrefixCacheReport
from twinmesh.engine.protocol.wire import decode_command, encode
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

THREE = SamplingParams(n=3, seed=10, max_tokens=8)


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    return make_fake(LLM, core, seed=1)


def ids(llm, text):
    return llm.tokenizer.encode(text)


# ---- on the way in


def test_a_request_carries_its_plan_its_hashes_and_its_bounds(llm, core):
    stream = llm.stream("the sea and the land", SamplingParams(temperature=0.5, seed=3, max_tokens=100))
    (submission,) = core.running.values()
    prompt = ids(llm, "the sea and the land")
    assert core.names() == [stream.request_id]
    assert submission.facts.prompt_len == len(prompt)
    assert submission.facts.max_tokens == 64 - len(prompt)
    assert submission.facts.block_hashes == block_hashes(prompt, 4)
    assert submission.prompt.dtype == np.int32
    assert submission.prompt.tolist() == prompt
    assert (submission.plan.temperature, submission.plan.seed) == (0.5, 3)
    assert submission.eos_ids == llm.tokenizer.eos_token_ids
    assert submission.stop is None


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_tools_reach_the_chat_template(kind, core):
    owner = make_fake(kind, core, template="{{ tools[0].name if tools else 'none' }}{{ messages | length }}")
    chat = [{"role": "user", "content": "hi"}]
    assert owner.chat_prompt(chat) == ids(owner, "none1")
    assert (
        owner.chat_prompt(chat, [{"name": "sea"}])
        == owner.chat_prompt(chat, tools=[{"name": "sea"}])
        == ids(owner, "sea1")
    )


def test_chat_gives_the_same_tools_to_every_conversation():
    llm = make_fake(LLM, FakeCore(answers=True), template="{{ tools[0].name }}{{ messages | length }}")
    chat = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([chat, chat * 2], tools=[{"name": "sea"}])
    assert [output.prompt_token_ids for output in outputs] == [ids(llm, "sea1"), ids(llm, "sea2")]
    assert [output.prompt for output in outputs] == ["sea1", "sea2"]


QUIET = "{{ '<' if add_generation_prompt }}{{ 'quiet ' if not think | default(true) }}{{ messages[0].content }}"


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_options_of_a_chat_reach_the_template(kind, core):
    owner, chat = make_fake(kind, core, template=QUIET), [{"role": "user", "content": "sea"}]
    assert owner.chat_prompt(chat) == ids(owner, "<sea")
    assert owner.chat_prompt(chat, chat_template_kwargs={"think": False}) == ids(owner, "<quiet sea")
    assert owner.chat_prompt(chat, add_generation_prompt=False) == ids(owner, "sea")
    another = owner.chat_prompt(chat, chat_template="{{ messages[0].content }}!")
    assert another == ids(owner, "sea!")
    open_end = owner.chat_prompt(
        chat, chat_template="{{ messages[0].content }}!", add_generation_prompt=False, continue_final_message=True
    )
    assert open_end == ids(owner, "sea")


def test_chat_gives_the_same_options_to_every_conversation():
    llm, seen = make_fake(LLM, FakeCore(answers=True), template=QUIET), []
    chat = [{"role": "user", "content": "sea"}]
    for messages in (chat, [chat, tuple(chat)]):
        for options in (
            {"chat_template_kwargs": {"think": False}},
            {"chat_template": "{{ messages[0].content }}!", "continue_final_message": True},
        ):
            outputs = llm.chat(messages, add_generation_prompt=False, **options)
            seen.append([output.prompt_token_ids for output in outputs])
    quiet, plain = ids(llm, "quiet sea"), ids(llm, "sea")
    assert seen == [[quiet], [plain], [quiet] * 2, [plain] * 2]
    for messages in ([], "hi", {"role": "user", "content": "x"}, [[]], ["hi"]):
        with pytest.raises(ValueError, match=r"non-empty list|expected a dict"):
            llm.chat(messages)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.uint16, int])
def test_a_plan_of_numpys_numbers_goes_into_messages(llm, core, kind):
    names = ("max_tokens", "logprobs", "prompt_logprobs", "top_k", "min_tokens", "seed")
    llm.stream([3, 4], SamplingParams(**{name: kind(2) for name in names}, stop_token_ids=[kind(5)]))
    (submission,) = core.running.values()
    sent = Accept(0, submission.prompt, submission.plan, submission.prompt[:0])
    assert decode_command(encode(sent)).plan == submission.plan
    assert submission.plan.logprobs == submission.plan.prompt_logprobs == 2


def test_max_tokens_none_goes_to_the_end_of_the_context(llm, core):
    llm.stream([5, 6, 7], SamplingParams(max_tokens=None))
    (submission,) = core.running.values()
    assert submission.facts.max_tokens == 61


def test_prompt_logprobs_or_no_prefix_cache_mean_no_hashes(llm, core):
    llm.stream([5] * 8, SamplingParams(prompt_logprobs=0))
    other_core = FakeCore()
    other = make_fake(LLM, other_core, config=replace(CONFIG, prefix_cache=False))
    other.stream([5] * 8)
    submissions = [*core.running.values(), *other_core.running.values()]
    assert [submission.facts.block_hashes for submission in submissions] == [(), ()]


def test_completions_of_a_request_enter_together_and_follow_the_first(llm, core):
    stream = llm.stream([5, 6], replace(THREE, prompt_logprobs=1, stop=["x"]))
    (batch,) = core.batches
    first, second, third = core.running.values()
    assert batch == [first.facts.id, second.facts.id, third.facts.id]
    assert core.names() == [stream.request_id] * 3
    assert [s.facts.fork_of for s in (first, second, third)] == [None, batch[0], batch[0]]
    assert [s.plan.seed for s in (first, second, third)] == [10, 11, 12]
    assert [s.plan.prompt_logprobs for s in (first, second, third)] == [1, None, None]
    assert first.stop is not second.stop


def test_seeds_wrap_around(llm, core):
    llm.stream([5], SamplingParams(n=2, seed=2**32 - 1))
    assert [s.plan.seed for s in core.running.values()] == [2**32 - 1, 0]


def test_seeds_of_more_than_32_bits_are_seeds_of_their_own(llm, core):
    for seed in (5, 2**32 + 5, 2**62 + 5, 2**63 - 1):
        llm.stream([5], SamplingParams(seed=seed))
    drawn = [s.plan.seed for s in core.running.values()]
    assert drawn[0] == 5
    assert len(set(drawn)) == 4
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_what_is_assigned_is_checked_when_a_request_starts_and_changes_none_that_has(llm, core):
    params = SamplingParams()
    params.min_tokens, params.max_tokens = 20, 30
    stream = llm.stream([5], params)
    params.detokenize, params.max_tokens = False, 40
    (submission,) = core.running.values()
    core.send(submission.facts.id, [5], finish_reason="length")
    assert (submission.plan.min_tokens, submission.facts.max_tokens) == (20, 30)
    assert stream.result().outputs[0].text != ""
    params.top_p = 7
    for refuses in (lambda: llm.stream([5], params), lambda: llm.check_sampling_params(params)):
        with pytest.raises(ValueError, match=r"^top_p=7 is not usable"):
            refuses()
    with pytest.raises(AttributeError, match="has no field max_token: the nearest is max_tokens"):
        params.max_token = 3


def test_clones_and_optional_values():
    params = SamplingParams.from_optional(temperature=0.5, top_p=None, stop=None, seed=4)
    assert params == SamplingParams(temperature=0.5, seed=4)
    twin = params.clone()
    twin.temperature = 0.7
    assert (params.temperature, twin.temperature, twin.seed) == (0.5, 0.7, 4)


def test_ids_with_a_text_are_run_and_the_text_is_shown(llm, core):
    stream = llm.stream({"prompt": "shown", "prompt_token_ids": [5, 6]})
    (submission,) = core.running.values()
    core.send(submission.facts.id, [7], finish_reason="length")
    output = stream.result()
    assert (output.prompt, output.prompt_token_ids) == ("shown", [5, 6])


def test_a_cache_salt_keeps_pages_apart_also_of_prompts_shorter_than_a_page(core):
    llm, ids = make_fake(LLM, core), [5, 6, 7, 8, 9]
    plain, one, same, other = ({"prompt_token_ids": ids, "cache_salt": salt} for salt in (None, "a", "a", "b"))
    for prompt in (plain, one, same, other):
        llm.stream(prompt)
    hashes = [s.facts.block_hashes for s in core.running.values()]
    assert [len(each) for each in hashes] == [1] * 4
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3
    assert len({s.chain for s in core.running.values()}) == 3
    with pytest.raises(ValueError, match=r"^cache_salt='' is not usable"):
        llm.stream({"prompt": "a", "cache_salt": ""})


def test_requests_without_a_seed_draw_one_from_the_engines(llm, core):
    llm.stream([5], SamplingParams(n=2))
    llm.stream([5])
    twin = FakeCore()
    other = make_fake(LLM, twin, seed=1)
    other.stream([5], SamplingParams(n=2))
    seeds = [submission.plan.seed for submission in core.running.values()]
    assert len(set(seeds)) == 3
    assert [submission.plan.seed for submission in twin.running.values()] == seeds[:2]


def test_the_engines_stop_check_and_the_callers_text_agree(llm, core):
    stream = llm.stream("a", SamplingParams(stop="land", min_tokens=2))
    (submission,) = core.running.values()
    answer = ids(llm, "the land!")
    stops = [submission.stop.push(i) for i in answer]
    end = next(i for i, stop in enumerate(stops) if stop)
    assert stops[end] == "land"
    core.send(stream.request_id, answer[: end + 1], finish_reason="stop", stop_reason="land")
    completion = stream.result().outputs[0]
    assert (completion.text, completion.stop_reason) == ("the ", "land")
    assert completion.token_ids == answer[: end + 1]


def test_parameters_are_checked_before_anything_starts(llm, core):
    with pytest.raises(ValueError, match="token id 5000"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(stop_token_ids=[5000])])
    assert not core.batches


# ---- on the way out


def test_a_stop_token_stays_out_of_the_text_unless_it_is_wanted(llm, core):
    stop, end = ids(llm, "!")[0], sorted(llm.tokenizer.eos_token_ids)[0]
    texts = []
    for params in (
        SamplingParams(stop_token_ids=[stop]),
        SamplingParams(stop_token_ids=[stop], include_stop_str_in_output=True),
    ):
        stream = llm.stream("a", params)
        core.send(stream.request_id, ids(llm, "sea!"), finish_reason="stop", stop_reason=stop)
        texts.append(stream.result().outputs[0].text)
    assert texts == ["sea", "sea!"]
    stream = llm.stream("a", SamplingParams(skip_special_tokens=False))
    core.send(stream.request_id, [end, *ids(llm, "sea"), end], finish_reason="stop")
    completion = stream.result().outputs[0]
    assert completion.text == llm.tokenizer.decode([end], skip_special=False) + "sea"
    assert completion.token_ids[-1] == end
    assert completion.stop_reason is None


def test_text_that_waited_for_a_stop_string_comes_with_the_end(llm, core):
    stream = llm.stream("a", SamplingParams(stop="sea!"))
    deltas = iter(stream)
    core.send(stream.request_id, ids(llm, "the sea"))
    assert next(deltas).text == "the "
    core.send(stream.request_id, finish_reason="length")
    assert next(deltas).text == "sea"
    assert stream.result().outputs[0].text == "the sea"


def test_without_detokenising_there_are_tokens_only(llm, core):
    stream = llm.stream("a", SamplingParams(detokenize=False, logprobs=1))
    core.send(stream.request_id, [5], scores=[scores((-0.5, 2, [7]))], finish_reason="length")
    completion = stream.result().outputs[0]
    assert (completion.text, completion.token_ids) == ("", [5])
    assert completion.logprobs == [{5: Logprob(-0.5, 2, None), 7: Logprob(-1.0, 1, None)}]


def test_logprobs_hold_the_sampled_token_and_the_most_likely_ones(llm, core):
    stream = llm.stream("a", SamplingParams(logprobs=2))
    a, b, c = ids(llm, "abc")
    core.send(stream.request_id, [a, b], scores=[scores((-1.0, 1, [a, c])), scores((-7.5, 9, [c, a]))])
    core.send(stream.request_id, [c], scores=[scores((-2.0, 2, [b, c]))], finish_reason="length")
    completion = stream.result().outputs[0]
    assert completion.logprobs == [
        {a: Logprob(-1.0, 1, "a"), c: Logprob(-2.0, 2, "c")},
        {b: Logprob(-7.5, 9, "b"), c: Logprob(-1.0, 1, "c"), a: Logprob(-2.0, 2, "a")},
        {c: Logprob(-2.0, 2, "c"), b: Logprob(-1.0, 1, "b")},
    ]
    assert completion.cumulative_logprob == -10.5


def test_no_logprobs_are_none_and_0_is_the_sampled_token_alone(llm, core):
    plain, zero = llm.stream("a"), llm.stream("a", SamplingParams(logprobs=0))
    core.send(plain.request_id, [5], finish_reason="length")
    core.send(zero.request_id, [5], scores=[scores((-1.5, 4, [7]))], finish_reason="length")
    completion = plain.result().outputs[0]
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    (at,) = zero.result().outputs[0].logprobs
    assert list(at) == [5]


def test_prompt_logprobs_come_in_pieces_and_begin_with_none(llm, core):
    stream = llm.stream([5, 6, 7, 8], SamplingParams(prompt_logprobs=1))
    core.send(stream.request_id, prompt_scores=[scores((-1, 1, [6]), (-2, 3, [9]))])
    core.send(
        stream.request_id, [5], prompt_scores=[scores((-3, 5, [9]))], cache=PrefixCacheReport(0), finish_reason="length"
    )
    output = stream.result()
    assert output.prompt_logprobs[0] is None
    assert [list(at) for at in output.prompt_logprobs[1:]] == [[6], [7, 9], [8, 9]]
    assert output.prompt_logprobs[3][8][:2] == (-3.0, 5)


def test_completions_of_a_request_come_back_as_one_in_order(llm, core):
    stream = llm.stream("a", THREE)
    first, second, third = core.running
    core.send(third, ids(llm, "c"), finish_reason="length", cache=PrefixCacheReport(0))
    core.send(first, ids(llm, "a"), finish_reason="length", cache=PrefixCacheReport(3))
    core.send(second, ids(llm, "b"), finish_reason="error", error="the mesh was lost.")
    assert [delta.index for delta in stream] == [2, 0, 1]
    output = stream.result()
    assert [completion.text for completion in output.outputs] == ["a", "b", "c"]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert output.finished
    assert output.error == "the mesh was lost."
    assert output.num_cached_tokens == 3
    assert output.timeline is output.outputs[1].timeline  # it ended last


# ---- by name


@pytest.mark.parametrize("verb", ["abort", "preempt", "migrate"])
def test_a_name_stands_for_all_completions_that_still_run(llm, core, verb):
    stream = llm.stream("a", THREE)
    names = list(core.running)
    core.send(names[1], finish_reason="length")
    getattr(llm, verb)(stream.request_id)
    assert [call[:2] for call in core.said] == [(verb, names[0]), (verb, names[2])]


def test_names_in_use_are_refused_and_free_again_after_the_end(llm, core):
    llm.add_request("mine", "a", THREE)
    with pytest.raises(ValueError, match="is in use"):
        llm.add_request("mine", "a")
    llm.abort("mine")
    assert llm.step()[0].finished
    llm.add_request("mine", "a")
    assert core.names() == ["mine"]


def test_an_abort_never_reaches_another_request_of_the_same_name(llm, core):
    """The first request ends, and its name is used again, between the look-up of its name and the aborts."""
    first = llm.stream("a", THREE)
    ids, abort = list(core.running), core.abort

    def late(id_):
        core.abort = abort
        for other in ids:
            core.send(other, finish_reason="length")
        llm.add_request(first.request_id, "a")
        abort(id_)

    core.abort = late
    llm.abort(first.request_id)
    assert core.said == [("abort", id_) for id_ in ids]
    assert core.names() == [first.request_id]


@pytest.mark.parametrize("leave", ["close", "iterate"])
def test_a_stream_that_is_left_aborts_its_own_request_only(llm, core, leave):
    stream = llm.stream("a")
    deltas = iter(stream)
    core.send(stream.request_id, [5])
    next(deltas)
    core.send(stream.request_id, finish_reason="length")  # which nobody has read yet
    llm.add_request(stream.request_id, "a")
    stream.close() if leave == "close" else deltas.close()
    assert core.names() == [stream.request_id]


@pytest.mark.parametrize("name", ["", 5, None])
def test_a_name_must_be_a_text(llm, name):
    with pytest.raises(ValueError, match=r"request_id|is in use"):
        llm.add_request(name, "a")
    assert not llm.has_unfinished_requests()


def test_the_engines_own_names_avoid_the_callers(llm, core):
    llm.add_request("request-1", "a")
    assert llm.stream("a").request_id != "request-1"


def test_what_ended_or_never_was_is_ignored(llm, core):
    stream = llm.stream("a")
    core.send(stream.request_id, finish_reason="length")
    for name in (stream.request_id, "nobody"):
        llm.abort(name)
        llm.preempt(name)
        llm.migrate(name, 1)
    assert core.said == []


def test_an_interrupt_while_a_request_enters_aborts_it(llm, core, monkeypatch):
    def interrupted(submissions, **options):
        FakeCore.submit(core, submissions)
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", THREE)
    assert not core.running
    assert [verb for verb, _ in core.said[:3]] == ["abort"] * 3


# ---- driven by hand


def test_a_step_gives_what_requests_with_news_have_made_so_far(llm, core):
    assert llm.step() == []
    llm.add_request("x", "a", SamplingParams(max_tokens=5))
    llm.add_request("y", "a", SamplingParams(max_tokens=5))
    core.send("x", ids(llm, "se"))
    (first,) = llm.step()
    assert (first.request_id, first.outputs[0].text, first.finished) == ("x", "se", False)
    core.send("x", ids(llm, "a"), finish_reason="length")
    core.send("y", ids(llm, "b"))
    x, y = llm.step()
    assert (x.outputs[0].text, x.finished) == ("sea", True)
    assert (y.outputs[0].text, y.finished) == ("b", False)
    assert first.outputs[0].text == "se"
    assert llm.has_unfinished_requests()
    core.send("y", finish_reason="length")
    assert llm.step()[0].finished
    assert not llm.has_unfinished_requests()


def test_a_request_that_cannot_start_leaves_nothing_to_step_for(llm, core):
    core.is_closed = True
    with pytest.raises(EngineError):
        llm.add_request("x", "a")
    assert not llm.has_unfinished_requests()
    assert llm.step() == []


# ---- scores


def test_a_score_is_of_the_continuations_tokens(llm, core):
    prompt, after = ids(llm, "the sea"), ids(llm, " and")
    whole = [*prompt, *after]

    def answer(submissions, **options):
        FakeCore.submit(core, submissions)
        (submission,) = submissions
        assert submission.prompt.tolist() == whole
        pieces = [scores(*((-float(i), 1, []) for i in range(1, len(whole))))]
        core.send(submission.facts.id, [5], prompt_scores=pieces, finish_reason="length")

    core.submit = answer
    (score,) = llm.score("the sea", " and")
    expected = [-float(i) for i in range(len(prompt), len(whole))]
    assert score.token_ids == after
    assert score.logprobs.tolist() == expected
    assert score.total == sum(expected)
    assert len(llm.score("the sea", [after, " and"])) == 2
    assert len(llm.score(["the sea", prompt], [" and", after])) == 2


def scoring(core, *tops):
    """Have the core score every prompt as soon as it comes, with these most likely tokens; list what comes."""
    seen = []

    def answer(submissions, **options):
        FakeCore.submit(core, submissions)
        (submission,) = submissions
        seen.append(submission)
        pieces = [scores(*[(-1.0, 1, list(tops))] * (submission.facts.prompt_len - 1))]
        core.send(submission.facts.id, [5], prompt_scores=pieces, finish_reason="length")

    core.submit = answer
    return seen


def test_scores_keep_to_their_prompts_salt_and_share_no_request_with_another(llm, core):
    seen = scoring(core)
    prompts = [{"prompt_token_ids": [5] * 8, "cache_salt": salt} for salt in ("a", "a", "b", None)]
    assert len(llm.score(prompts, [[40], [41], [40], [41]])) == 4
    assert [submission.chain for submission in seen] == [salted("a"), salted("b"), b""]
    assert len({submission.facts.block_hashes for submission in seen}) == 3
    with pytest.raises(ValueError, match="continuation has the cache_salt 'a': give it with the prompt"):
        llm.score("a", {"prompt": "b", "cache_salt": "a"})


def test_a_replay_names_the_tokens_that_were_asked_for(core):
    llm = make_fake(LLM, core, config=replace(CONFIG, max_logprobs=10**6))
    scoring(core, 9, 8, 7)
    params = SamplingParams(trace_decode_token_ids=[5, 6], logprob_token_ids=[8])
    (output,) = llm.generate([3, 4], params)
    assert [list(at) for at in output.outputs[0].logprobs] == [[5, 8], [6, 8]]


@pytest.mark.parametrize(
    ("prompts", "continuations", "says"),
    [
        ("a", "", "continuation is empty"),
        ("", "a", "prompt is empty"),
        (["a", "b"], ["c"], "2 prompts and 1 continuations"),
        ("a", [10_000], "outside 0 to"),
        ("a", [5] * 64, "65 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_starts(llm, core, prompts, continuations, says):
    with pytest.raises(ValueError, match=says):
        llm.score(prompts, continuations)
    assert not core.batches


def test_a_score_that_was_aborted_is_an_error(llm, core):
    def aborting(submissions, **options):
        FakeCore.submit(core, submissions)
        core.abort(submissions[0].facts.id)

    core.submit = aborting
    with pytest.raises(EngineError, match="aborted before it was scored"):
        llm.score("a", "b")


# ---- threads


def test_several_threads_generate_stream_and_abort_at_once():
    llm = make_fake(LLM, FakeCore(answers=True))
    texts = [f"{word} sea" for word in ("the", "a", "one", "in")]
    params, results, reasons = SamplingParams(n=2, max_tokens=60), {}, set()

    def abort():
        for _ in range(50):
            stream = llm.stream("on the other hand", params)
            llm.abort(stream.request_id)
            reasons.update(completion.finish_reason for completion in stream.result().outputs)

    def work(text):
        results[text] = [output.outputs[1].text for output in llm.generate([text] * 20, params)]

    threads = [threading.Thread(target=abort), *(threading.Thread(target=work, args=(text,)) for text in texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {text: [text] * 20 for text in texts}
    assert reasons <= {"abort", "length"}
    assert llm.metrics().running == 0


def test_options_are_the_same_for_both_kinds():
    assert inspect.signature(LLM) == inspect.signature(AsyncLLM)


# ---- SentencePiece, which takes a space off the start of a text


@pytest.fixture
def spm(core, tiny_spm):
    return make_fake(LLM, core, tokenizer=tokenizer_from_gguf(tiny_spm))


def test_a_completion_keeps_its_first_space(spm, core):
    answer = spm.tokenizer.encode("a b", add_special=False)
    stream = spm.stream("x", SamplingParams(logprobs=1))
    for token in answer[:-1]:
        core.send(stream.request_id, [token], scores=[scores((-0.5, 1, [token]))])
    core.send(stream.request_id, answer[-1:], scores=[scores((-0.5, 1, answer[-1:]))], finish_reason="length")
    deltas = list(stream)
    completion = stream.result().outputs[0]
    assert completion.text == "".join(delta.text for delta in deltas) == " a b"
    named = [at[token].decoded_token for at, token in zip(completion.logprobs, answer, strict=True)]
    assert "".join(named) == " a b"


def test_a_completion_of_no_text_starts_one(spm, core):
    stream = spm.stream([1], SamplingParams())
    core.send(stream.request_id, spm.tokenizer.encode("a b", add_special=False), finish_reason="length")
    assert stream.result().outputs[0].text == "a b"


@pytest.mark.parametrize(("stop", "text"), [(" b", " a"), (" a", ""), ("a b", " "), ("b", " a ")])
def test_stop_strings_may_start_with_a_space(spm, core, stop, text):
    stream = spm.stream("x", SamplingParams(stop=stop))
    answer = spm.tokenizer.encode("a b", add_special=False)
    (submission,) = core.running.values()
    ends = [submission.stop.push(i) for i in answer]
    core.send(stream.request_id, answer[: ends.index(stop) + 1], finish_reason="stop", stop_reason=stop)
    assert stream.result().outputs[0].text == text


def test_prompt_tokens_are_named_with_their_spaces(spm, core):
    stream = spm.stream("a b", SamplingParams(prompt_logprobs=0))
    prompt = spm.tokenizer.encode("a b")
    core.send(stream.request_id, [prompt[-1]], prompt_scores=[scores(*[(-1.0, 1, [])] * (len(prompt) - 1))])
    core.send(stream.request_id, finish_reason="length")
    named = [at[token].decoded_token for at, token in zip(stream.result().prompt_logprobs[1:], prompt[1:], strict=True)]
    assert "".join(named) == " a b"


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_the_tokenizer_is_handed_out_by_vllms_name(kind, core):
    owner = make_fake(kind, core)
    assert owner.get_tokenizer() is owner.tokenizer
    ids = owner.get_tokenizer().encode("the sea")
    assert owner.get_tokenizer().decode(ids) == "the sea"
    assert owner.check_prompt("the sea").token_ids == ids
