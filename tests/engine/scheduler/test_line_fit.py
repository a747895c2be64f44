"""A fading line: within what was measured, never negative, and not spoilt by what stalled."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.scheduler.line_fit import LineFit, Terms

sizes = st.integers(1, 4096)
seconds = st.floats(0.0, 1e3, allow_nan=False)
shares = st.floats(0.0, 1.0)


def fitted(measured, share=0.5):
    fit = LineFit(share)
    for size, value in measured:
        fit.add(size, value)
    return fit


@given(st.lists(st.tuples(sizes, seconds), min_size=1), shares)
def test_no_part_is_negative_and_the_mean_stays_within_what_was_measured(measured, share):
    fit = fitted(measured, share)
    terms = fit.terms()
    assert terms.fixed >= 0
    assert terms.each >= 0
    values = [value for _, value in measured]
    slack = 1e-9 * max(values)
    assert min(values) - slack <= terms.at(fit.mean_size) <= max(values) + slack


@given(sizes, st.lists(seconds, min_size=1), shares)
def test_with_one_size_all_that_is_expected_of_it_was_measured(size, values, share):
    slack = 1e-9 * max(values)
    assert min(values) - slack <= fitted([(size, v) for v in values], share).terms().at(size) <= max(values) + slack


@given(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-2), st.lists(sizes, min_size=30, max_size=60))
def test_a_line_is_found_where_sizes_spread(fixed, each, measured):
    line = Terms(fixed, each)
    fit = fitted([(size, line.at(size)) for size in [*measured, 1, 4096, 1, 4096]], share=each * 2048 / line.at(2048))
    for size in (1, 100, 4096):
        assert fit.terms().at(size) == pytest.approx(line.at(size), rel=0.5)


def reference(measured, share):
    """Fit as `LineFit` does, looking at the line before every value."""
    fixed = each = mean_size = mean = var = cov = 0.0
    for count, (size, value) in enumerate(measured, 1):
        most = 4 * (fixed + each * size)
        if count > 1 and value > most > 0 and value > mean:
            value = max(most, mean)
        weight = 1 / min(count, 64)
        off, change = size - mean_size, value - mean
        mean_size, mean = mean_size + weight * off, mean + weight * change
        var, cov = (1 - weight) * (var + weight * off * off), (1 - weight) * (cov + weight * off * change)
        ridge, steepest = 0.01 * mean_size * mean_size, mean / mean_size
        each = min(max(0.0, (cov + ridge * share * steepest) / (var + ridge)), steepest)
        fixed = max(0.0, mean - each * mean_size)
    return Terms(fixed, each)


runs = st.lists(st.tuples(sizes, st.lists(st.sampled_from([0.0, 0.9, 1.0, 1.1, 3.9, 4.1, 60.0]), max_size=40)))


@given(runs, shares)
def test_a_run_of_one_size_is_the_same_as_its_values_one_by_one_to_the_last_bit(runs, share):
    fit, now, measured = LineFit(share), 0.0, []
    for size, values in runs:
        ends = list(accumulate(values, initial=now))
        fit.add_run(size, now, ends[1:])
        measured += [(size, after - before) for before, after in pairwise(ends)]
        now = ends[-1]
    assert fit.terms() == reference(measured, share)


def test_the_share_decides_where_all_sizes_are_alike():
    measured = [(100, 1.0)] * 10
    assert fitted(measured, 1.0).terms() == Terms(0.0, pytest.approx(0.01))
    assert fitted(measured, 0.0).terms() == Terms(1.0, 0.0)


def test_one_that_stalled_moves_the_mean_by_little_and_is_forgotten():
    usual = [(8, 0.01)] * 100
    assert fitted([*usual, (8, 60.0)]).terms().at(8) < 0.011
    assert fitted([*usual, (8, 60.0), *usual]).terms().at(8) == pytest.approx(0.01, rel=0.02)


def test_the_size_of_a_second_measurement_takes_nothing_from_what_it_took():
    assert fitted([(5, 1.0), (1, 1.0)], 1.0).terms().at(3) == pytest.approx(1.0)


def test_what_has_really_become_slower_is_found_to_be_so():
    assert fitted([(8, 0.01)] * 200 + [(8, 0.1)] * 300).terms().at(8) == pytest.approx(0.1, rel=0.05)
    assert fitted([(8, 0.1)] * 200 + [(8, 0.01)] * 300).terms().at(8) == pytest.approx(0.01, rel=0.2)
