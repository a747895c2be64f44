"""The page in a real browser: it opens without a complaint, and draws the numbers of the JSON."""

import json
import re
from html import unescape

import pytest
from helpers import browser
from helpers.measured_runs import benchmark
from helpers.pages import Page

pytest.importorskip("plotly", reason="pip install 'twinmesh[report]'")

from twinmesh.engine.benchmark.page.page import page_of
from twinmesh.engine.benchmark.page.runs import Named

pytestmark = pytest.mark.skipif(browser.chromium() is None, reason=browser.HOW)

# What each figure has drawn, as plotly has it after its own arithmetic; then another load is chosen.
_PROBE = """
<script>
function drawn() {
  const found = {};
  for (const div of document.querySelectorAll(".plot")) {
    if (!div.calcdata) continue;
    found[div.id] = div.calcdata.map(trace => ({
      name: trace[0].trace.name, x: trace.map(one => one.x ?? one.s), y: trace.map(one => one.y ?? one.p),
      hasInk: div.querySelector(".scatterlayer path, .barlayer path") !== null,
    }));
  }
  return found;
}
const before = drawn();
const select = document.querySelector(".picker select");
select.selectedIndex = select.options.length - 1;
select.dispatchEvent(new Event("change"));
const root = document.documentElement;
parent.postMessage(JSON.stringify({ before, after: drawn(), wide: root.scrollWidth, room: root.clientWidth }), "*");
</script>
"""
# A window of a browser is no narrower than 500 pixels, a frame is.
_PHONE = """
<iframe src="page.html" width="390" height="844"></iframe><pre id="probe"></pre>
<script>onmessage = event => { document.getElementById("probe").textContent = event.data; };</script>
"""


@pytest.fixture(scope="module")
def runs():
    return benchmark(2, 5), benchmark(2, 5, seed=1)


@pytest.fixture(scope="module")
def seen(runs, tmp_path_factory):
    """The page of two runs with long names, as wide as on a phone: the probe's findings, and the console."""
    named = [Named(f"a run whose long name breaks nothing {'x' * 90}{place}", run) for place, run in enumerate(runs)]
    page = tmp_path_factory.mktemp("page") / "page.html"
    page.write_text(page_of(named).replace("</body>", f"{_PROBE}</body>"))
    phone = page.with_name("phone.html")
    phone.write_text(_PHONE)
    document, console = browser.opened(phone)
    found = re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    assert found[1], console
    return json.loads(unescape(found[1])), console, Page(page.read_text())


def test_nothing_is_written_to_the_console(seen):
    assert seen[1] == []


def test_every_figure_that_is_shown_is_drawn(seen):
    probe, _, page = seen
    assert set(probe["before"]) < set(probe["after"]) == set(page.figures)
    assert [name for name, traces in probe["after"].items() if not all(one["hasInk"] for one in traces)] == []


def test_what_is_drawn_are_the_numbers_of_the_runs(seen, runs):
    drawn = seen[0]["after"]

    def trace(figure, name):
        return next(one for one in drawn[figure] if one["name"] == name)

    for letter, run in zip("AB", runs, strict=True):
        reports = [point.measured.report for point in run.points]
        goods = trace("goodput-by-rate", letter)
        assert goods["x"] == [2, 5]
        assert goods["y"] == pytest.approx([report.goodput.per_second for report in reports])
        speeds = trace("throughput-output", letter)
        assert speeds["x"] == pytest.approx([1 / report.tpot.p50 for report in reports])
        assert speeds["y"] == pytest.approx([report.output_tokens_per_second_per_gpu for report in reports])
        curve = trace("ttft-cdf", f"{letter}, rate 5")
        within = [share for ms, share in zip(curve["x"], curve["y"], strict=True) if ms <= 1000 * reports[1].ttft.p90]
        assert within[-1] == pytest.approx(0.9, abs=0.02)


def test_a_phone_need_not_scroll_sideways(seen):
    assert seen[0]["wide"] == seen[0]["room"] <= 390
