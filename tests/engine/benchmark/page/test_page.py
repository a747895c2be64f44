"""The report's page: its numbers are the JSON's, what is lacking is said, and names do no harm."""

import json

import pytest
from helpers.measured_runs import benchmark, measured
from helpers.pages import Page
from twinmesh.engine.metrics.benchmark_file import About, Accuracy, Benchmark, Point, benchmark_json
from twinmesh.engine.metrics.load_report import Power

pytest.importorskip("plotly", reason="pip install 'twinmesh[report]'")

from twinmesh.engine.benchmark.page.page import page_of
from twinmesh.engine.benchmark.page.runs import Named


def shown(*benchmarks):
    return Page(page_of([Named(f"run {place}", one) for place, one in enumerate(benchmarks)]))


@pytest.fixture(scope="module")
def sweep():
    return benchmark(2, 5, 9)


@pytest.fixture(scope="module")
def page(sweep):
    return shown(sweep)


@pytest.fixture(scope="module")
def reports(sweep):
    """The JSON as any program reads it: by the name of a point, its report."""
    return {point["name"]: point["report"] for point in json.loads(benchmark_json(sweep))["points"]}


def test_tables_have_the_numbers_of_the_json(page, reports):
    for name, file in reports.items():
        report, figures = file["report"], file["figures"]
        for latency in ("ttft", "tpot", "itl", "e2e"):
            values = report[latency]
            assert page.row("latency", f"{name}: {latency.upper()}") == [
                values[key] for key in ("count", "mean", "p50", "p90", "p99")
            ]
        good = report["goodput"]
        assert page.row("goodput", name)[1:3] == [good["judged"], good["met"]]
        assert page.row("goodput", name)[4:7] == [good["ttft_share"], good["tpot_share"], good["per_second"]]
        parts = report["worst_parts"]
        assert page.row("ttft-parts", f"{name}: slowest 1 %")[1:] == [
            parts[key] for key in ("queue", "prefill", "host", "handoff")
        ]
        rates = page.row("throughput", name)
        assert rates[0] == 1 / report["tpot"]["p50"]
        assert rates[1:5] == [
            figures["output_tokens_per_second_per_gpu"], figures["total_tokens_per_second_per_gpu"],
            figures["output_tokens_per_second"], figures["total_tokens_per_second"],
        ]  # fmt: skip
        assert page.row("dollars", name) == list(figures["dollars"].values())
        joules = page.row("joules", name)
        assert joules[0] == report["power"]["watts"]
        assert joules[3] == figures["joules_per_output_token"]
        assert joules[1] == pytest.approx(joules[3] * report["tokens"]["output"])
        tokens = report["tokens"]
        assert page.row("cache", name)[:3] == [tokens["prompt"], tokens["cached"], figures["hit_rate"]]
        assert page.row("cache", name)[4:] == [4000, 500]
        assert page.row("glance", name)[0:3] == [figures["requests"], figures["finished"], report["wall"]]
    for place, file in enumerate(reports.values()):
        (flip,) = file["report"]["flips"]
        assert page.row(f"flips-run-{place}", "1") == list(flip.values())


def test_figures_have_the_numbers_of_the_json(page, reports):
    files = list(reports.values())
    goods = [file["report"]["goodput"] for file in files]
    assert page.trace("goodput-by-rate", "goodput")["x"] == [2, 5, 9]
    assert page.trace("goodput-by-rate", "goodput")["y"] == [good["per_second"] for good in goods]
    assert page.trace("attainment-by-rate", "both")["y"] == [good["met"] / good["judged"] for good in goods]
    assert page.trace("ttft-by-load", "P99")["y"] == [1000 * file["report"]["ttft"]["p99"] for file in files]
    loads = page.trace("throughput-output", "loads")
    assert loads["y"] == [file["figures"]["output_tokens_per_second_per_gpu"] for file in files]
    bars = page.trace("ttft-parts-mean", "queue")
    assert bars["x"] == [1000 * file["report"]["parts"]["queue"] for file in files]
    roles = page.figures["roles-run-1"]["data"]
    assert {one["name"] for one in roles} == {"prefill", "decode", "both", "flips"}


def test_a_curve_is_that_of_the_records(page, reports):
    for name, file in reports.items():
        curve = page.trace("ttft-cdf", name)
        columns = file["report"] and file["records"]["columns"]
        pairs = zip(columns["first_token"], columns["arrival"], columns["reason"], strict=True)
        ttft = sorted(1000 * (first - arrival) for first, arrival, reason in pairs if reason < 2)
        assert curve["x"] == pytest.approx(ttft, rel=1e-5)
        assert curve["y"] == pytest.approx([(place + 1) / len(ttft) for place in range(len(ttft))], rel=1e-5)
        gaps = page.trace("itl-cdf", name)
        assert gaps["x"] == pytest.approx([1000 * seconds for seconds, _ in file["report"]["itl_counts"]], rel=1e-5)
        assert gaps["y"][-1] == 1


def test_two_runs_stand_beside_each_other(sweep):
    other = benchmark(2, 5, 9, seed=1)
    page = shown(sweep, other)
    before, after = (one.points[1].measured.report for one in (sweep, other))
    assert page.row("change", "rate 5")[0] == pytest.approx(after.ttft.p50 / before.ttft.p50 - 1)
    assert {one["name"] for one in page.figures["ttft-cdf"]["data"]} >= {"A, rate 2", "B, rate 9"}
    assert page.row("runs", "name") == ["run 0", "run 1"]
    single = shown(Benchmark(About(), sweep.points[:1]), Benchmark(About(), other.points[2:]))
    assert single.row("change", "rate 2")[0] == pytest.approx(
        other.points[2].measured.report.ttft.p50 / sweep.points[0].measured.report.ttft.p50 - 1
    )


def test_endpoints_are_steps_over_the_p90_of_tpot_with_the_score():
    run = benchmark(2, 5, about=About(preset="endpoints", shaped_like="MLPerf Endpoints", scale=0.1))
    asked = Accuracy(name="sums", asked=32, right=12, failed=2)
    page = shown(Benchmark(run.about, tuple(point._replace(accuracy=asked) for point in run.points)))
    loads = page.trace("throughput-endpoints", "loads")
    assert loads["x"] == [1 / point.measured.report.tpot.p90 for point in run.points]
    assert loads["y"] == [point.measured.report.output_tokens_per_second for point in run.points]
    assert page.trace("throughput-endpoints", "frontier")["line"]["shape"] == "vh"
    assert page.row("accuracy", "rate 5") == ["sums", 12, 32, 2, 12 / 32]
    assert "no figure compares with the published ones" in page.sections["runs"]


def test_what_is_lacking_is_said_and_not_drawn():
    lacking = measured(
        3, slo=None, gaps=None, power=Power(watts=1730, basis="name plate"), dollars_per_gpu_hour=None,
        missed_tokens=None, late=None, flips=[], samples=0,
    )  # fmt: skip
    page = shown(Benchmark(About(), (Point("w", lacking._replace(records=None)),)))
    said = {
        "goodput": "No request had a target", "throughput": "One load gives one point",
        "over-time": "Nobody took samples", "cost": "Power was not measured", "latency": "without its records",
    }  # fmt: skip
    for name, sentence in said.items():
        assert sentence in page.sections[name]
        assert page.plots[name] == []
    assert "No price of a GPU-hour is known" in page.sections["cost"]
    assert "nobody counted the reasons" in page.sections["cache"]
    assert "joules" not in page.tables
    assert "by-load" not in page.sections


def test_a_run_in_which_nothing_finished_has_a_page():
    failed = measured(3, count=60)
    records = type(failed.records)(record for record in failed.records if record.reason == "error")
    report = type(failed.report).of(records, failed.report.run)
    page = shown(Benchmark(About(), (Point("w", failed._replace(report=report, records=records)),)))
    assert "No request finished" in page.sections["latency"]
    assert "0 of 2 requests finished (2 error)" in page.sections["glance"]


def test_names_are_texts_and_short_in_figures():
    name = "</script><b>x</b>&" + "long" * 60
    run = benchmark(2)
    text = page_of([Named(name, Benchmark(run.about, (Point(name, run.points[0].measured),)))])
    page = Page(text)
    assert "<b>x</b>" not in text
    assert page.row("runs", "name") == [name]
    assert max(len(one["name"]) for one in page.figures["ttft-cdf"]["data"]) <= 30


def test_a_page_of_two_long_sweeps_is_below_6_mb():
    """Ten loads of 1,000 requests and 1,000 samples each, twice."""
    run = measured(5, count=1000, samples=1000)
    one = Benchmark(About(), tuple(Point(f"concurrency {2**place}", run, 2**place) for place in range(10)))
    assert len(page_of([Named("a", one), Named("b", one)])) < 6e6


def test_plotly_itself_knows_all_that_figures_have(page):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in page.figures.values():
        graph_objects.Figure(figure)  # raises at what it does not know


def test_a_page_may_use_no_network():
    text = page_of([Named("a", benchmark(2))])
    assert "default-src 'none'" in text
    assert " src=" not in text[: text.index("<script")]
