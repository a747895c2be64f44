"""What the page computes itself: frontiers, stretches of time, and numbers as texts."""

import numpy as np
import pytest
from helpers.measured_runs import measured
from twinmesh.engine.benchmark.page import bins
from twinmesh.engine.benchmark.page.drawing import ramp, thinned
from twinmesh.engine.benchmark.page.numbers import change, duration, percent, plain, ticks
from twinmesh.engine.benchmark.page.tradeoff import frontier


def test_a_frontier_has_the_points_that_no_other_beats_in_both():
    assert frontier([(1, 9), (2, 9), (3, 4), (2, 3), (5, 1), (5, 2)]) == [(2, 9), (3, 4), (5, 2)]
    assert frontier([]) == []


def test_utilisation_counts_gpus_and_follows_roles():
    run = measured(5)
    over = bins.stretches(run.series)
    used = bins.utilisation(run.series, run.report, over)
    assert len(used) == 20
    assert used[0] == pytest.approx((1 * 1 + 3 * 0.5) / 4)  # one mesh of 1 GPU always, one of 3 half of the time
    assert used[-1] == pytest.approx(3 * 0.5 / 4)
    roles = bins.utilisation_by_role(run.series, run.report, over)
    assert roles["prefill"][0] == pytest.approx(1)
    assert np.isnan(roles["prefill"][-1])
    assert roles["both"][-1] == pytest.approx(0)
    assert roles["decode"] == pytest.approx([0.5] * 20)


def test_ttft_stands_where_requests_arrived():
    run = measured(5)
    over = bins.Stretches(np.array([0.0, 1e9]))
    finished = [record.ttft for record in run.records if record.reason == "length"]
    assert bins.ttft_by_arrival(run.records, over, 90) == pytest.approx([np.percentile(finished, 90)])


def test_thinned_samples_keep_peaks_and_ends():
    t, values = bins.peaks(list(range(1000)), [5.0 if place == 777 else 1.0 for place in range(1000)], 50)
    assert len(t) == 50
    assert (777, 5.0) in zip(t, values, strict=True)
    assert thinned(1000, 3) == [0, 500, 999]
    assert thinned(2, 30) == [0, 1]
    assert thinned(0, 30) == []


def test_numbers_have_three_digits_that_matter():
    assert [plain(one) for one in (0, 0.01234, 4.567, 78.94)] == ["0", "0.0123", "4.57", "78.9"]
    assert [plain(one) for one in (1234.5, 1e-9)] == ["1,234", "1.00e-09"]
    assert [duration(one) for one in (0.0123, 2.5)] == ["12.3 ms", "2.50 s"]
    assert [percent(one) for one in (0.5, 0.123, 0.99871, 1)] == ["50 %", "12.3 %", "99.87 %", "100 %"]
    assert [change(2, 3), change(3, 2)] == ["+50.0 %", "\N{MINUS SIGN}33.3 %"]
    places, texts = ticks(3, 40)
    assert texts[places.index(20)] == "20"
    assert ticks(1, 1e6)[1][-1] == "1,000,000"


def test_loads_have_colours_from_a_light_one_to_a_heavy_one():
    colors = [ramp(place, 10) for place in range(10)]
    assert len(set(colors)) == 10
    assert colors[0] == ramp(0, 1)
