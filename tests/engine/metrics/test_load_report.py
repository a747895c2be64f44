"""The load report: every figure on runs small enough to be followed by hand, and its file and page."""

import json

import pytest
from twinmesh.engine.metrics.gaps import Gaps
from twinmesh.engine.metrics.load_report import Flip, LoadReport, MeshUse, Power, Run
from twinmesh.engine.metrics.report_file import parse_report, read_report, report_json, write_report
from twinmesh.engine.metrics.report_text import WIDTH, as_text
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.protocol.service import SLO

RUN = Run(source="simulated", workload="w", model="m", device="h100", gpus=4, topology="prefill=1,decode=3", seed=7)


def record(number, arrival, ttft, tpot, output=11, prompt=100, **more):
    """A request that finished, with these latencies."""
    first = arrival + ttft
    last = first + tpot * (output - 1)
    return RequestRecord(number, arrival, prompt, output, 0, first, last, last, **more)


def failed(number, arrival, reason, finish=None, output=0, slo=None):
    return RequestRecord(number, arrival, 100, output, 0, None, None, finish, reason=reason, slo=slo)


def test_latencies_are_of_requests_that_finished():
    records = [record(n, float(n), (n + 1) / 10, 0.01) for n in range(11)] + [failed(11, 11.0, "error", 90.0)]
    report = LoadReport.of(records, RUN)
    assert (report.ttft.count, report.ttft.p50, report.ttft.p90) == (11, pytest.approx(0.6), pytest.approx(1.0))
    assert (report.tpot.mean, report.tpot.p99) == (pytest.approx(0.01), pytest.approx(0.01))
    assert report.e2e.p50 == pytest.approx(0.7)
    assert report.wall == pytest.approx(90.0)
    assert report.ended == {"length": 11, "error": 1}
    assert (report.requests, report.finished) == (12, 11)


def test_a_single_token_has_no_tpot_and_keeps_to_any():
    report = LoadReport.of([record(0, 0.0, 0.5, 0.0, output=1)], RUN, slo=SLO(tpot_ms=1))
    assert report.tpot is None
    assert (report.goodput.met, report.goodput.judged) == (1, 1)


def test_goodput_needs_every_target_and_failures_stay_in_the_denominator():
    slo = SLO(ttft_ms=500, tpot_ms=50, percentile=50)
    records = [
        record(0, 0.0, 0.4, 0.04), record(1, 1.0, 0.4, 0.06), record(2, 2.0, 0.6, 0.04), record(3, 3.0, 0.5, 0.0),
        failed(4, 4.0, "error", 10.0), failed(5, 5.0, "refused"), failed(6, 6.0, "deadline", 9.0, output=3),
        failed(7, 7.0, "abort", 8.0),
    ]  # fmt: skip
    good = LoadReport.of(records, RUN, slo=slo).goodput
    assert (good.judged, good.met, good.share) == (7, 2, pytest.approx(2 / 7))
    assert good.per_second == pytest.approx(2 / 10)
    assert (good.ttft_share, good.tpot_share) == (pytest.approx(3 / 7), pytest.approx(3 / 7))
    assert good.is_attained is False
    assert LoadReport.of(records[:4], RUN, slo=slo).goodput.is_attained is True


def test_a_request_is_held_to_its_own_slo_before_that_of_the_run():
    own = SLO(ttft_ms=1000)
    records = [record(0, 0.0, 0.6, 0.2, slo=own), record(1, 0.0, 0.6, 0.2)]
    assert LoadReport.of(records, RUN, slo=SLO(ttft_ms=500, tpot_ms=50)).goodput.met == 1
    good = LoadReport.of(records, RUN).goodput
    assert (good.judged, good.met, good.is_attained) == (1, 1, None)
    assert LoadReport.of(records[1:], RUN).goodput is None


def test_throughput_divides_by_all_gpus_and_counts_finished_requests():
    records = [record(0, 0.0, 1.0, 0.9), failed(1, 0.0, "deadline", 5.0, output=500)]
    report = LoadReport.of(records, RUN)
    assert report.wall == pytest.approx(10.0)
    assert report.output_tokens_per_second == pytest.approx(1.1)
    assert report.total_tokens_per_second_per_gpu == pytest.approx(11.1 / 4)


def test_cost_divides_the_whole_price_by_each_kind_of_token():
    power = Power(watts=1000.0, basis="name plate")
    report = LoadReport.of([record(0, 0.0, 1.0, 0.9)], RUN, dollars_per_gpu_hour=3.6, power=power)
    # 10 s of 4 GPUs at 0.001 $/s are 0.04 $, over 100 and 11 tokens.
    assert report.dollars.input == pytest.approx(0.04 / 100 * 1e6)
    assert report.dollars.output == pytest.approx(0.04 / 11 * 1e6)
    assert report.dollars.total == pytest.approx(0.04 / 111 * 1e6)
    assert report.joules_per_output_token == pytest.approx(40_000 / 11)
    assert LoadReport.of([failed(0, 0.0, "refused")], RUN, dollars_per_gpu_hour=1.0).dollars.total is None


def test_utilisation_weighs_meshes_by_their_gpus():
    meshes = (MeshUse(role="prefill", gpus=1, busy=10.0), MeshUse(role="decode", gpus=3, busy=2.0))
    report = LoadReport.of([record(0, 0.0, 1.0, 0.9)], RUN, meshes=meshes)
    assert report.utilisation == pytest.approx((10 + 3 * 2) / 4 / 10)
    assert LoadReport.of([record(0, 0.0, 1.0, 0.9)], RUN).utilisation is None


def test_parts_are_means_over_all_and_over_the_worst_hundredth():
    records = [record(n, 0.0, 0.2, 0.01, queue=0.1, prefill=0.08, host=0.02, handoff=0.5) for n in range(199)]
    records.append(record(199, 0.0, 9.0, 0.01, queue=8.0, prefill=0.9, host=0.1))
    report = LoadReport.of(records, RUN)
    assert report.parts.queue == pytest.approx((199 * 0.1 + 8.0) / 200)
    lone = LoadReport.of(records[:50] + records[-1:], RUN).worst_parts  # P99 lies between the two
    assert (lone.queue, lone.prefill, lone.host, lone.handoff) == (8.0, 0.9, 0.1, 0.0)


def test_gaps_are_within_half_a_percent_however_many():
    gaps = Gaps()
    assert gaps.distribution() is None
    gaps.add(0.02, 10**8)
    gaps.add(0.5, 2 * 10**6)
    found = gaps.distribution()
    assert found.count == 102 * 10**6
    assert gaps.counts() == ((found.p50, 10**8), (found.p99, 2 * 10**6))
    assert (found.p50, found.p90, found.p99) == tuple(pytest.approx(value, rel=0.005) for value in (0.02, 0.02, 0.5))
    assert found.mean == pytest.approx((0.02 * 100 + 0.5 * 2) / 102)


def test_no_records_are_no_report():
    with pytest.raises(ValueError, match="nothing to report"):
        LoadReport.of([], RUN)


def test_records_come_out_of_the_table_as_they_went_in():
    own = SLO(ttft_ms=5)
    records = [
        record(3, 1.0, 0.5, 0.01, queue=0.1, prefill=0.3, handoff=0.2, host=0.1, reason="stop", slo=own),
        failed(1, 2.0, "refused"),
    ]
    table = RequestRecords(records)
    assert (len(table), list(table), table[-2]) == (2, records, records[0])
    assert table[0].slo == own


def report_and_records():
    gaps = Gaps()
    gaps.add(0.01, 30)
    records = RequestRecords(
        [record(n, n * 1.5, 0.3, 0.01, slo=SLO(ttft_ms=400) if n == 2 else None) for n in range(40)]
        + [failed(40, 70.0, "refused")]
    )
    report = LoadReport.of(
        records,
        RUN,
        slo=SLO(ttft_ms=1000, tpot_ms=50, percentile=99),
        meshes=[MeshUse(role="prefill", gpus=1, busy=9.0), *[MeshUse(role="decode", gpus=1, busy=3.0)] * 3],
        flips=[Flip(t=n * 1.0, mesh=1, before="decode", after="prefill", reason="demand " * 20) for n in range(9)],
        gaps=gaps,
        dollars_per_gpu_hour=1.3,
        power=Power(watts=1730.0, basis="name plate"),
    )
    return report, records


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    report, records = report_and_records()
    path = tmp_path / "report.json"
    write_report(path, report, records)
    again, table, _ = read_report(path)
    assert again == report
    assert list(table) == list(records)
    write_report(path, report)
    assert read_report(path) == (report, None, None)
    figures = json.loads(path.read_bytes())["figures"]
    assert figures["output_tokens_per_second"] == report.output_tokens_per_second
    assert figures["dollars"]["total"] == report.dollars.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "is a load report of version 1, and this reads 2"),
        ({"format": "other"}, "r.json is no load report"),
        ({"report": {}}, "r.json is damaged"),
        ({"records": {"columns": {}, "reasons": ["stop"], "slos": {}}}, "its reasons are"),
    ],
)
def test_what_is_no_report_of_this_version_is_refused(change, message):
    report, records = report_and_records()
    data = json.loads(report_json(report, records)) | change
    with pytest.raises(ValueError, match=message):
        parse_report(json.dumps(data).encode(), "r.json")


@pytest.mark.parametrize(
    ("name", "values"),
    [("queue", None), ("queue", [1.0]), ("prompt_len", [1.5] * 41), ("reason", [9] * 41), ("prompt_len", [2**70] * 41)],
)
def test_columns_that_cannot_be_are_refused(name, values):
    report, records = report_and_records()
    data = json.loads(report_json(report, records))
    data["records"]["columns"].pop(name)
    if values is not None:
        data["records"]["columns"][name] = values
    with pytest.raises(ValueError, match=r"r\.json is damaged: .*column"):
        parse_report(json.dumps(data).encode(), "r.json")


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b"{}", b"[" * 100_000])
def test_what_is_no_json_of_ours_is_one_sentence(text):
    with pytest.raises(ValueError, match="is no load report: give the JSON"):
        parse_report(text, "r.json")


def test_the_page_fits_a_terminal_and_holds_the_figures():
    report, _ = report_and_records()
    page = as_text(report)
    lines = page.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= 40
    expected = (
        "w, simulated, seed 7", "40 length, 1 refused", "300.00", "97.56%", "asked of 99 %: missed", "Dispersion",
        "1730 W a GPU (name plate)", "$ per million tokens at 1.3 $/GPU-hour", "Flips: 9, the last 8",
    )  # fmt: skip
    for text in expected:
        assert text in page, page
    assert as_text(LoadReport.of([failed(0, 0.0, "refused")], RUN)).splitlines()[-1].startswith("Tokens/s: 0.0 output")
