"""What comes of pairs of runs; running them is not for tests."""

import pytest
from twinmesh.scripts.bench import before


def pairs(*ratios):
    return [{"before": {"decode": 10.0}, "after": {"decode": 10.0 * ratio}} for ratio in ratios]


def test_a_ratio_above_one_says_that_this_checkout_is_faster():
    (row,) = before.summarise(pairs(1.1, 1.3, 0.9))
    assert row["figure"] == "decode"
    assert row["median"] == pytest.approx(1.1)
    assert row["range"] == pytest.approx([0.9, 1.3])
    assert row["ratios"] == pytest.approx([1.1, 1.3, 0.9])


def test_the_interval_holds_the_median_and_is_the_same_each_time():
    ratios = [0.97, 0.98, 0.99, 1.0, 1.0, 1.01, 1.02, 1.05, 0.9, 1.1]
    low, high = before.interval(ratios)
    assert min(ratios) < low <= 1.0 <= high < max(ratios)
    assert before.interval(ratios) == (low, high)


def test_equal_pairs_leave_no_doubt():
    assert before.interval([1.0] * 5) == (1.0, 1.0)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    assert before.main(["--before", str(tmp_path)]) == 2
    assert "is no checkout of Twinmesh" in capsys.readouterr().err
