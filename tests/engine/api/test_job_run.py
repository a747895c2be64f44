"""Many jobs through one engine, without an engine: which class they are of, their window, what is counted."""

import math

import pytest
from helpers.fake_core import FakeCore, make_fake
from twinmesh import LLM, AsyncLLM, EngineError, SamplingParams
from twinmesh.engine.protocol.service import DEFAULT, Service

THREE = SamplingParams(max_tokens=3)
JOBS = [("the sea", THREE), ("and the land", THREE), ("the sea and the land", THREE)]


def services(core):
    return [submission.facts.service for submission in core.running.values()]


def begin(run):
    """Start a run that nothing answers yet; its first None says that it has started."""
    results = run.outputs(every=0.001)
    assert next(results) is None
    return results


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_jobs_of_as_completed_are_batch_work_of_either_engine(kind):
    core = FakeCore(answers=True)
    seen = []
    submit = core.submit

    def watched(submissions, **options):
        seen.extend(submission.facts.service for submission in submissions)
        submit(submissions, **options)

    core.submit = watched
    owner = make_fake(kind, core)
    assert sorted(index for index, _ in owner.as_completed(JOBS, deadline=1000.0)) == [0, 1, 2]
    assert all(service.is_batch for service in seen)
    assert len({service.due for service in seen}) == 1
    assert seen[0].due >= 1000.0


def test_the_jobs_of_other_methods_are_interactive():
    core = FakeCore()
    llm = make_fake(LLM, core)
    llm.stream("the sea", THREE)
    assert services(core) == [DEFAULT]


def test_what_a_job_says_of_its_service_is_kept():
    core = FakeCore()
    llm = make_fake(LLM, core)
    job = llm.check_request("the sea", THREE, session="s")
    results = begin(llm.run_jobs([job]))
    assert services(core) == [Service(session="s", is_batch=True)]
    results.close()
    assert core.said[-1][0] == "abort"


def test_promoted_jobs_are_served_as_interactive_ones_and_so_are_later_ones():
    core = FakeCore()
    llm = make_fake(LLM, core)
    run = llm.run_jobs(JOBS, window=2, deadline=50.0)
    results = begin(run)
    first, second = core.running
    run.promote()
    assert core.said == [("serve", first, DEFAULT), ("serve", second, DEFAULT)]
    assert run.promoted == 2
    core.send(first, [5], finish_reason="length")
    assert next(result for result in results if result)[0] == 0
    while len(core.running) < 2:
        next(results)
    assert services(core)[-1] == DEFAULT
    assert (run.promoted, run.entered) == (3, 3)
    results.close()


def test_tokens_count_as_they_come_and_prompts_once_they_are_answered():
    core = FakeCore()
    llm = make_fake(LLM, core)
    run = llm.run_jobs(JOBS[:2])
    results = begin(run)
    lengths = [len(submission.prompt) for submission in core.running.values()]
    assert (run.tokens, run.asked) == (0, sum(lengths) + 6)
    first = next(iter(core.running))
    core.send(first, [5])
    core.send(first, [6])
    while run.tokens < lengths[0] + 2:
        next(results)
    assert run.tokens == lengths[0] + 2
    results.close()


@pytest.mark.parametrize("deadline", [0, -1.0, math.nan, math.inf, "1"])
def test_a_deadline_that_is_no_number_above_0_is_refused_at_once(deadline):
    with pytest.raises(ValueError, match=r"^deadline=.* is not usable"):
        make_fake(LLM, FakeCore()).as_completed(JOBS, deadline=deadline)


def test_leaving_the_iteration_aborts_what_is_left():
    core = FakeCore()
    llm = make_fake(LLM, core)
    run = llm.run_jobs(JOBS)
    results = begin(run)
    results.close()
    assert not core.running
    assert [said for said, *_ in core.said] == ["abort"] * 3


def test_a_closed_engine_refuses_jobs():
    core = FakeCore()
    llm = make_fake(LLM, core)
    llm.close()
    with pytest.raises(EngineError):
        list(llm.as_completed(JOBS))
