"""Requests that are made before they are due, and their tokens."""

import numpy as np
import pytest
from twinmesh.engine.api.client import Ticket
from twinmesh.engine.api.job import Job
from twinmesh.engine.api.prompts import Prompt
from twinmesh.engine.benchmark import ready as module
from twinmesh.engine.benchmark.prompts import Prompts
from twinmesh.engine.benchmark.ready import Ready
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.simulation.workload import WorkRequest


class Client:
    """Checks nothing, and notes what it was given."""

    def __init__(self):
        self.checked = []

    def clock(self):
        return 9.0

    def check(self, ids, params, service):
        self.checked.append((len(ids), params.max_tokens))
        return Job(Prompt(None, ids), params, None, 0.0, service, 1.0)


@pytest.fixture
def client():
    return Client()


def ready(client, works, going_on=()):
    def ticket(number, job):
        submission = Submission(0.0, None, job.prompt.ids, None, frozenset(), None, None)
        return Ticket(number, (submission,))

    return Ready(client, works, Prompts(100, 4), frozenset(going_on), ticket)


def test_requests_are_made_once_in_order_and_arrive_when_they_are_due(client):
    works = [WorkRequest(length, 2, 0.0) for length in (5, 6, 7)]
    made = ready(client, works)
    assert [made.make_next() for _ in range(4)] == [True, True, True, False]
    assert client.checked == [(5, 2), (6, 2), (7, 2)]
    ticket, job = made.take(1, 3.5, 77)
    (sent,) = ticket.submissions
    assert (sent.arrival, sent.tokenised, sent.entered, sent.after) == (3.5, 3.5, 9.0, 77)
    assert (ticket.request, len(job.prompt.ids), len(sent.prompt)) == (1, 6, 6)
    assert len(client.checked) == 3


def test_only_so_many_lie_ready_and_those_sent_before_are_not_made_again(client, monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 10)
    made = ready(client, [WorkRequest(5, 1, 0.0) for _ in range(4)])
    made.take(2, 0.0, None)
    assert [made.make_next() for _ in range(3)] == [True, True, False]
    made.take(0, 0.0, None)
    made.take(1, 0.0, None)
    assert [made.make_next() for _ in range(2)] == [True, False]
    assert len(client.checked) == 4


def test_what_goes_on_with_an_answer_waits_for_it(client):
    made = ready(client, [WorkRequest(5, 1, 0.0), WorkRequest(9, 1, None, 0)], going_on=[1])
    assert [made.make_next(), made.make_next()] == [True, False]
    made.make(1, np.arange(50, 56, dtype=np.int32))
    assert made.take(1, 0.0, None)[1].prompt.ids[:6].tolist() == list(range(50, 56))


def test_prompts_of_other_seeds_share_nothing():
    work = WorkRequest(40, 1, 0.0, blocks=(1, 2, 3))
    first, again, other = (Prompts(1000, 4, seed).ids(0, work) for seed in ((0,), (0,), (1,)))
    assert first.tolist() == again.tolist()
    assert np.mean(first == other) < 0.2
    assert first.min() >= 3
    assert first.max() < 1000
    assert len(set(first.tolist())) > 30
