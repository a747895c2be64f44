"""Instants that are due: the earliest first, each key once, whatever was set and taken off before."""

from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.scheduler.agenda import Agenda

KEYS = st.integers(0, 5)


@given(st.lists(st.tuples(st.sampled_from(["set", "drop", "pop"]), KEYS, st.integers(0, 9))))
def test_an_agenda_is_a_dict_whose_earliest_come_first(steps):
    agenda, instants = Agenda(), {}
    for what, key, t in steps:
        if what == "set":
            agenda.set(key, float(t))
            instants[key] = float(t)
        elif what == "drop":
            agenda.drop(key)
            instants.pop(key, None)
        else:
            due = agenda.pop_due(float(t))
            assert sorted(due) == sorted(k for k, instant in instants.items() if instant <= t)
            found = [instants.pop(key) for key in due]
            assert found == sorted(found)
        assert agenda.next_due() == min(instants.values(), default=None)


def test_instants_that_were_taken_off_are_cleared_away():
    agenda = Agenda()
    for key in range(10_000):
        agenda.set(key, 1e9)
        agenda.drop(key)
    assert agenda.size < 200
