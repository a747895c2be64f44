"""An idle engine checks itself, for a small part of its time."""

import pytest
from twinmesh.engine.core.integrity import IdleCheck


class Thread:
    """A thread's clock, and the checks that it ran, each of which takes `cost` seconds."""

    def __init__(self, cost):
        self.now, self.cost, self.checks = 5.0, cost, 0

    def check(self):
        self.now += self.cost
        self.checks += 1


@pytest.mark.parametrize("cost", [1e-4, 0.01, 0.5])
def test_a_check_runs_at_the_first_idle_turn_and_takes_a_hundredth_of_the_time(cost):
    thread = Thread(cost)
    idle = IdleCheck(thread.check, lambda: thread.now)
    idle.idle()
    assert thread.checks == 1
    start = thread.now
    while thread.checks < 11:
        thread.now += 0.003  # a turn's work
        idle.idle()
    assert 10 * cost <= 0.0101 * (thread.now - start)


def test_a_check_that_finds_something_raises():
    def check():
        raise AssertionError("page 3 has two holders")

    with pytest.raises(AssertionError, match="page 3"):
        IdleCheck(check, lambda: 0.0).idle()
