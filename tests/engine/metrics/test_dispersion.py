"""The index of dispersion of counts."""

import numpy as np
import pytest
from twinmesh.engine.metrics.dispersion import dispersion, index_of_dispersion


def test_it_is_the_variance_of_counts_over_their_mean():
    # Counts of 3, 1, 0, 2 in windows of 2 s from the first arrival; the last arrival begins one that is not full.
    times = [5.0, 5.5, 6.9, 7.0, 11.0, 12.9, 13.1]
    assert index_of_dispersion(times, 2) == pytest.approx(np.var([3, 1, 0, 2]) / np.mean([3, 1, 0, 2]))
    assert index_of_dispersion(times[::-1], 2) == index_of_dispersion(times, 2)


def test_a_poisson_process_has_1_and_an_even_pace_0():
    random = np.random.default_rng(0)
    times = np.cumsum(random.exponential(0.1, 100_000))
    assert all(value == pytest.approx(1, abs=0.15) for value in dispersion(times).values())
    assert index_of_dispersion(np.arange(0, 1000, 0.25), 10) == 0


def test_groups_of_k_at_once_have_k_times_that_of_one():
    times = np.cumsum(np.random.default_rng(1).exponential(0.1, 10_000))
    assert index_of_dispersion(np.repeat(times, 7), 5) == pytest.approx(7 * index_of_dispersion(times, 5))


@pytest.mark.parametrize("times", [[], [3.0], [3.0] * 9, [0.0, 1.5]])
def test_without_two_windows_it_is_unknown(times):
    assert index_of_dispersion(times, 1) is None


def test_a_few_arrivals_in_many_years_are_counted_without_their_seconds():
    # Two windows of 3e15 hold one arrival each: variance 2 / 3e15, mean likewise.
    assert index_of_dispersion([0.0, 1e15, 3e15], 1) == pytest.approx(1.0)
