"""What the headline experiment asks of its engines and makes of their figures; what it measures is not for tests."""

import json

import pytest
from helpers.measured_runs import benchmark
from helpers.pages import Page
from twinmesh.engine.metrics.report_file import report_json
from twinmesh.scripts.bench import driver as bench_driver
from twinmesh.scripts.bench import headline
from twinmesh.scripts.bench.headline import Engine
from twinmesh.scripts.bench.headline_verdict import OURS, PLANNED, compare, shown, verdict


def point(rate, itl, ttft, goodput, kept=True, roles=("both", "both")):
    return {"rate": rate, "itl_p99": itl, "ttft_p50": ttft, "goodput": goodput, "is_attained": kept, "roles": roles}


def row(topology, *points, chunk=64):
    return {"engine": str(Engine(topology, chunk)), "topology": topology, "chunk": chunk, "points": list(points)}


def test_the_same_requests_come_closer_together_at_a_higher_rate():
    slow, fast = (list(headline.load(headline.arguments([]), rate).requests) for rate in (0.5, 1.0))
    assert sorted((one.prompt_len, one.output_len) for one in slow) == sorted(
        (one.prompt_len, one.output_len) for one in fast
    )
    assert [one.time for one in slow] == pytest.approx([2 * one.time for one in fast])
    longs = [one.time for one in fast if one.prompt_len == 1024]
    assert longs == [7.5] * 3 + [22.5] * 3 + [37.5] * 3 + [52.5] * 3
    assert len(fast) == 60 + 12


def test_ours_is_held_against_the_smoothest_that_is_as_early_and_at_its_own_best_rate():
    rows = [
        row(OURS, point(0.5, 0.01, 1.0, 3.0), point(1.0, 0.02, 2.0, 5.2)),
        row(PLANNED, point(0.5, 0.1, 1.0, 3.0), point(1.0, 0.1, 1.0, 3.0, roles=("both", "decode"))),
        row("both=1", point(0.5, 0.2, 0.9, 4.0), point(1.0, 0.2, 1.0, 9.0, kept=False)),
        row("both=2", point(0.5, 0.06, 1.0, 2.0), point(1.0, 0.03, 3.0, 4.0)),
    ]
    found = compare(rows)
    first, second = found["rates"]
    assert (first["smoothest_as_early"], first["itl_p99_ratio"]) == ("both=2, chunk 64", pytest.approx(6.0))
    assert (first["best_goodput"], first["goodput_ratio"]) == ("both=1, chunk 64", pytest.approx(0.75))
    assert (second["smoothest_as_early"], second["itl_p99_ratio"]) == ("both=1, chunk 64", pytest.approx(10.0))
    assert second["planner"] == ("both", "decode")
    # Of both=1 only the lower rate keeps to the SLO.
    assert found["feasible"]["both=1, chunk 64"] == {"rate": 0.5, "goodput": 4.0}
    assert (found["best_colocated"], found["goodput_ratio"]) == ("both=1, chunk 64", pytest.approx(1.3))
    assert [one["topology"] for one in shown(found, rows)] == [OURS, PLANNED, "both=1", "both=2"]
    said = "\n".join(verdict(found))
    assert "rate 0.5: ITL p99 6.00 times shorter than both=2, chunk 64; goodput 0.75 of both=1, chunk 64" in said
    assert "the planner ends with both, both" in said


def test_where_nothing_keeps_to_the_slo_there_is_no_ratio():
    rows = [row(OURS, point(1.0, 1, 1, 1.0, False)), row("both=1", point(1.0, 1, 9, 1.0, False))]
    found = compare(rows)
    assert found["goodput_ratio"] is None
    assert found["rates"][0]["itl_p99_ratio"] is None
    assert "no colocated engine has first tokens as early" in next(verdict(found))


def test_a_sweep_in_parts_measures_the_slo_and_every_engine_once_and_ends_in_a_page(tmp_path, monkeypatch, capsys):
    called, report = [], json.loads(report_json(*benchmark(2).points[0].measured))

    def apart(function, *given):
        called.append(function.__name__)
        if function is headline.alone:
            return {"ttft_ms": 400.0, "tpot_ms": 20.0}
        engine, _, slo = given
        assert (slo.ttft_ms, slo.tpot_ms, slo.percentile) == (400.0, 20.0, 90.0)
        more = {"came": 1.2, "ttft_p90": 1.0, "tpot_p90": 0.1, "share": 1.0, "report": report}
        found = row(engine.topology, {**point(1.0, 0.1, 1.0, 1.0), **more})
        return {**found, "engine": str(engine)}

    monkeypatch.setattr(headline, "apart", apart)
    given = ["--json", str(tmp_path / "h.json"), "--chunks", "32", "64", "--rivals", "both=1", "--rates", "1"]
    page = tmp_path / "h.html"
    for whole in (False, True):
        assert headline.main([*given, "--most", "2", "--html", str(page)]) == 0
        assert page.exists() == whole
        assert ("goodput at the best such rate: 1.00 times" in capsys.readouterr().out) == whole
    assert called == ["alone"] + 4 * ["measure"]
    assert json.loads((tmp_path / "h.json").read_text())["verdict"]["goodput_ratio"] == 1.0
    assert Page(page.read_text()).row("runs", "name") == [
        "prefill=1,decode=1, chunk 512", "pool=2, chunk 512", "both=1, chunk 32",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="with other arguments"):
        headline.main([*given, "--most", "1", "--period", "1"])
    headline.main([*given[2:], "--workers", "processes", "--most", "1"])
    assert "prefill=1,decode=1 in processes, chunk 512" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists: give another name"):
        headline.main(given)


def test_the_drivers_lateness_is_judged_by_the_round_in_the_middle(monkeypatch, capsys):
    rounds = [{"sent": 9, "ended": 9, "p50": 0.0, "p99": p99, "max": 1.0} for p99 in (0.005, 0.0005, 0.0009)]
    monkeypatch.setattr(bench_driver, "measure", lambda args: rounds)
    assert bench_driver.main([]) == 0
    assert "p99 0.900 ms" in capsys.readouterr().out
    rounds[1]["p99"] = 0.002
    assert bench_driver.main([]) == 1
    assert bench_driver.row([0.0] * 99 + [1.0], 100)["p99"] == pytest.approx(0.01)
