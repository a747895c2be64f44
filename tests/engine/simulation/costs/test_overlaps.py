"""For how long others computed beside a step."""

import pytest
from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Prefill
from twinmesh.engine.simulation.costs.measured import Beside
from twinmesh.engine.simulation.costs.overlaps import Ran, measured_steps


def prefill(mesh, begin, end):
    return Ran(Prefill(mesh, 0, 64, (Chunk(0, 0, 0, 10, 5, 0, True),)), begin, end, True)


def decode(mesh, begin, end):
    return Ran(Decode(mesh, 0, 8, 2, (DecodeRow(0, 0, 0, 7), DecodeRow(1, 0, 1, 9))), begin, end, False)


def test_counts_are_of_all_passes_together():
    first, second = measured_steps([prefill(0, 0.0, 1.0), decode(0, 1.0, 3.0)])
    assert (first.kind, first.chunks, first.pairs, first.rows, first.seconds) == ("prefill", 1, 65, 0, 1.0)
    assert (second.kind, second.passes, second.rows, second.context) == ("decode", 2, 4, 7 + 9 + 8 + 10)
    assert first.is_queued
    assert not second.is_queued
    assert first.beside == second.beside == ()  # steps of one mesh are not beside each other


def test_a_time_is_divided_by_how_many_others_computed():
    ran = [decode(0, 0.0, 10.0), prefill(1, 2.0, 6.0), prefill(2, 4.0, 7.0), decode(3, 9.0, 20.0), prefill(1, 30, 31)]
    of_first, of_second, *_ = measured_steps(ran)
    assert dict(((p, d), s) for s, p, d in of_first.beside) == pytest.approx({(1, 0): 3.0, (2, 0): 2.0, (0, 1): 1.0})
    assert sorted(of_second.beside) == [Beside(2.0, 0, 1), Beside(2.0, 1, 1)]
