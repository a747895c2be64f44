"""The order in which a batch run gives its requests to the engine."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.api.job import Job
from twinmesh.engine.api.prompts import Prompt
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.order import Prepared, arrange
from twinmesh.engine.batch.request_lines import BatchRequest
from twinmesh.engine.protocol.sampling_plan import SamplingPlan


def prepared(token_ids, max_tokens=8, line=1, n=1):
    params = SamplingParams(max_tokens=max_tokens, n=n)
    job = Job(Prompt(None, np.array(token_ids, np.int32)), params, SamplingPlan(temperature=1.0, seed=0), 0.0)
    return Prepared.of(BatchRequest(line, f"line-{line}", None, token_ids, None, params), job)


def order(requests, **options):
    return [request.request.line for request in arrange(requests, page_size=2, **options)]


def test_the_prompt_is_what_it_was():
    assert prepared([7, 0, 2**31 - 1]).job.prompt.token_ids == [7, 0, 2**31 - 1]


def test_what_may_run_longest_goes_first():
    limits = (8, 64, None, 8)
    assert order([prepared([i] * 4, limit, i) for i, limit in enumerate(limits)]) == [2, 1, 0, 3]
    assert order([prepared([1] * 4, 8, 1), prepared([2] * 4, 4, 2, n=3)]) == [2, 1]


def test_prompts_that_share_a_page_follow_each_other():
    prompts = [[1, 1, 5], [2, 2, 5], [1, 1, 6], [2, 2, 6], [1, 1, 5]]
    assert order([prepared(ids, line=i) for i, ids in enumerate(prompts)]) == [0, 4, 2, 1, 3]


def test_a_longer_shared_prefix_binds_more():
    prompts = [[1, 1, 2, 2, 3], [1, 1, 4, 4, 3], [1, 1, 2, 2, 9], [1, 1, 4, 4, 9]]
    assert order([prepared(ids, line=i) for i, ids in enumerate(prompts)]) == [0, 2, 1, 3]


def test_conversations_of_any_length_do_not_exhaust_the_stack():
    requests = [prepared([1] * (2 * turn + 1), line=turn) for turn in range(3000)]
    assert sorted(order(requests, ahead=5000)) == list(range(3000))


def test_only_so_many_are_read_ahead():
    read = 0

    def source():
        nonlocal read
        for line in range(100):
            read += 1
            yield prepared([line, line, line], line=line)

    taken = 0
    for _ in arrange(source(), page_size=2, ahead=8):
        assert read <= taken + 16
        taken += 1
    assert taken == 100


def test_long_prompts_fill_a_block_early():
    read = []

    def source():
        for line in range(20):
            read.append(line)
            yield prepared([line] * 10, line=line)

    next(arrange(source(), page_size=2, ahead=8, tokens=30))
    assert len(read) == 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=40), st.integers(1, 9))
def test_every_request_comes_once(prompts, ahead):
    requests = [prepared(ids, max_tokens=1 + len(ids), line=i) for i, ids in enumerate(prompts)]
    assert Counter(order(requests, ahead=ahead)) == Counter(range(len(prompts)))
