"""`twinmesh bench report`: files in, a page out; bad input is one sentence."""

import sys

import pytest
from helpers.measured_runs import benchmark
from helpers.pages import Page
from twinmesh.engine.metrics.benchmark_file import benchmark_json
from twinmesh.scripts.bench.report import main
from twinmesh.scripts.cli import main as twinmesh


@pytest.fixture
def run(tmp_path):
    pytest.importorskip("plotly", reason="pip install 'twinmesh[report]'")
    path = tmp_path / "run.json"
    path.write_bytes(benchmark_json(benchmark(2)))
    return path


def test_a_page_is_written_beside_its_run_and_never_over_another(run, capsys):
    assert main([str(run)]) == 0
    page = run.with_suffix(".html")
    assert capsys.readouterr().out == f"Wrote {page}.\n"
    assert "run" in Page(page.read_text()).row("runs", "name")
    with pytest.raises(ValueError, match=r"run\.html exists: give another name, or move it away"):
        main([str(run)])


def test_files_are_compared_in_their_order_and_a_price_counts_for_all(run, tmp_path):
    other = tmp_path / "more" / "run.json"
    other.parent.mkdir()
    other.write_bytes(benchmark_json(benchmark(3)))
    main([str(run), "--compare", str(other), "--html", str(tmp_path / "both.html"), "--gpu-hour-price", "4"])
    page = Page((tmp_path / "both.html").read_text())
    assert page.row("runs", "name") == [str(run), str(other)]
    assert page.row("dollars", "A")[0] == page.row("dollars", "B")[0] == 4
    main(["--compare", str(other), str(run), "--html", str(tmp_path / "same.html")])
    assert Page((tmp_path / "same.html").read_text()).row("runs", "name") == [str(other), str(run)]
    with pytest.raises(ValueError, match="5 runs on one page: give 1 to 4"):
        main([*map(str, (run, "--compare", other, *spare(tmp_path, 3))), "--html", str(tmp_path / "five.html")])


def spare(folder, count):
    paths = [folder / f"spare{place}.json" for place in range(count)]
    for path in paths:
        path.write_bytes(benchmark_json(benchmark(2)))
    return paths


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{}", "is no benchmark: give the JSON"),
        (b'{"format":"twinmesh benchmark","version":99}', "is a benchmark of version 99"),
        (b'{"format":"twinmesh load report","version":1}', "is a load report of version 1"),
        (b'{"format":"twinmesh benchmark","version":1,"points":3}', "is damaged"),
    ],
)
def test_a_file_that_is_no_run_is_one_sentence(tmp_path, capsys, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert twinmesh(["bench", "report", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_without_a_run_or_with_one_twice_there_is_no_page(run, tmp_path):
    with pytest.raises(ValueError, match="there is no run to show"):
        main([])
    with pytest.raises(ValueError, match="a run is compared with itself"):
        main([str(run), "--compare", str(run), "--html", str(tmp_path / "p.html")])


def test_without_plotly_its_extra_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    path.write_bytes(benchmark_json(benchmark(2)))
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert twinmesh(["bench", "report", str(path)]) == 2
    assert "pip install 'twinmesh[report]'" in capsys.readouterr().err
