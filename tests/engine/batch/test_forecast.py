"""When a batch job will be done, by what was left over lately."""

from math import inf, isclose, isinf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.batch.forecast import LATELY, Forecast, Standing, seconds_needed


def standing(tokens=0, left=10, done=0, tokens_done=0, asked=100.0):
    return Standing(tokens, left, done, tokens_done, asked)


def test_lines_left_are_taken_for_the_mean_of_those_done():
    assert standing(tokens=90, left=5, done=3, tokens_done=60).demand == 5 * 20 - 30


def test_where_no_line_is_done_they_are_taken_for_what_they_may_come_to():
    assert standing(tokens=90, left=5).demand == 410


def test_a_line_that_is_left_is_never_nothing():
    assert standing(tokens=900, left=1, done=1, tokens_done=10).demand == 1
    assert standing(tokens=900, left=0, done=1, tokens_done=10).demand == 0


def test_nothing_is_predicted_before_a_part_of_the_time_was_seen():
    forecast = Forecast(0.0, 100.0)
    assert forecast.look(9.0, standing(tokens=1)) is None
    assert forecast.look(10.0, standing(tokens=1)) == pytest.approx(10 + 999 * 10 - 100)


def test_a_minute_is_enough_of_a_long_time():
    forecast = Forecast(0.0, 10_000.0)
    assert forecast.look(LATELY - 1, standing()) is None
    assert isinf(forecast.look(LATELY, standing()))


def test_only_the_last_minute_counts():
    forecast = Forecast(0.0, 1000.0)
    for second in range(100):
        forecast.look(float(second), standing(tokens=1000 * second, left=10_000))
    for second in range(100, 100 + int(LATELY) + 1):
        late = forecast.look(float(second), standing(tokens=100_000, left=10_000))
    assert forecast.rate == pytest.approx(0.0, abs=20)
    assert late > 10_000


def test_a_job_that_is_past_its_deadline_is_late_whatever_was_seen():
    assert Forecast(0.0, 1.0).look(1.5, standing(tokens=999)) > 0.5


def test_a_job_that_is_done_is_not_late():
    assert Forecast(0.0, 1.0).look(5.0, standing(tokens=100, left=0, done=1, tokens_done=100)) is None


@given(
    rate=st.floats(1.0, 1e6),
    lines=st.integers(1, 10_000),
    line=st.integers(1, 5_000),
    slack=st.floats(0.5, 2.0),
    looks=st.integers(3, 40),
)
def test_at_a_steady_rate_a_job_is_late_just_where_it_does_not_fit(rate, lines, line, slack, looks):
    """Every line takes as many tokens; the deadline is `slack` times what the job needs."""
    needed = lines * line / rate
    due = slack * needed
    forecast, late = Forecast(0.0, due), None
    for look in range(1, looks):
        now = needed * look / looks
        tokens = now * rate
        done = int(tokens // line)
        late = forecast.look(now, Standing(int(tokens), lines - done, done, done * line, float(line)))
    error = (lines + line + looks) / rate * looks  # of whole tokens and lines
    if late is not None:
        assert late <= needed - due + error or lines * line < 100
    elif forecast.rate > 0 and now >= min(LATELY, 0.1 * due):
        assert needed - due <= error


@given(
    times=st.lists(st.floats(0.001, 50.0), min_size=1, max_size=60),
    steps=st.lists(st.integers(0, 1000), min_size=60, max_size=60),
    due=st.floats(0.1, 5_000.0),
)
def test_a_forecast_is_late_and_finite_unless_nothing_was_left_over(times, steps, due):
    forecast, now, tokens = Forecast(0.0, due), 0.0, 0
    for gap, step in zip(times, steps, strict=False):
        now, tokens = now + gap, tokens + step
        late = forecast.look(now, standing(tokens=tokens, left=100_000, done=1, tokens_done=1))
        assert late is None or late > 0
        assert late is None or isinf(late) == (forecast.rate == 0)


@given(demand=st.floats(0, 1e9), rate=st.floats(0, 1e9))
def test_the_seconds_needed_are_those_of_the_rate(demand, rate):
    seconds = seconds_needed(demand, rate)
    assert seconds >= 0
    if demand and not rate:
        assert seconds == inf
    elif demand and seconds < 1e300:
        assert isclose(seconds * rate, demand, rel_tol=1e-6, abs_tol=1e-300)
