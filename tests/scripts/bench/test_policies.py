"""The comparison of policies: its arithmetic, on traces small enough to be followed by hand."""

import json

import pytest
from twinmesh.engine.scheduler.policy import policy_named
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.scripts.bench import policies
from twinmesh.scripts.bench.policies import at_load, figures, prefill_seconds, simulate
from twinmesh.scripts.bench.virtual_engine import StepTime

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.5000000,2000,4
2023-11-16 18:15:46.5000000,2000,4
2023-11-16 18:15:46.5000000,1000,2
2023-11-16 18:15:56.5000000,100,1
"""
TIMES = StepTime(step=1.0, token=0.001, row=0.0)


def arrival(at, prompt_len, output_len):
    return WorkRequest(prompt_len, output_len, at)


@pytest.mark.parametrize("line", ["yesterday,5,5", "2023-11-16 18:15:46,many,5", "2023-11-16 18:15:46,5"])
def test_a_line_that_is_no_request_is_named(tmp_path, capsys, line):
    (tmp_path / "trace.csv").write_text(TRACE + line + "\n")
    assert policies.main(["--trace", str(tmp_path / "trace.csv")]) == 2
    assert "trace.csv, line 6: " in capsys.readouterr().err


@pytest.mark.parametrize(("trace", "topology"), [("nowhere.csv", "both=1"), ("trace.csv", "both=none")])
def test_what_the_command_cannot_run_is_one_sentence(tmp_path, capsys, trace, topology):
    (tmp_path / "trace.csv").write_text(TRACE)
    assert policies.main(["--trace", str(tmp_path / trace), "--topology", topology]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("load", "meshes"), [(0.8, 1), (0.5, 2)])
def test_load_is_the_share_of_time_that_prefill_is_busy(load, meshes):
    arrivals = [arrival(0.0, 512, 1), arrival(1.0, 1024, 1), arrival(4.0, 512, 1)]
    stretched = at_load(arrivals, load, TIMES, meshes)
    assert prefill_seconds(arrivals, TIMES) == pytest.approx(4 * (1.0 + 0.512))
    assert stretched[-1].at * load * meshes == pytest.approx(prefill_seconds(arrivals, TIMES))
    assert stretched[1].at / stretched[2].at == pytest.approx(0.25)


@pytest.mark.parametrize(("load", "last", "text"), [(0.0, 1.0, "load=0.0 is not usable"), (0.8, 0.0, "no later than")])
def test_a_load_that_time_cannot_be_stretched_to_is_refused(load, last, text):
    with pytest.raises(ValueError, match=text):
        at_load([arrival(0.0, 8, 1), arrival(last, 8, 1)], load, TIMES)


def test_first_come_first_served_takes_prompts_as_they_came():
    # A full step takes 1.512 s, half a one 1.256 s.
    arrivals = [arrival(0.0, 512, 2), arrival(0.5, 512, 2), arrival(0.6, 256, 2)]
    fcfs = simulate(arrivals, policy_named("fcfs"), TIMES, "prefill=1,decode=1")
    assert fcfs == pytest.approx([1.512, 3.024 - 0.5, 4.280 - 0.6])


def test_the_shortest_prompt_of_those_that_wait_comes_first():
    # The first two go at once, since two steps may be in flight.
    arrivals = [arrival(0.0, 512, 1), arrival(0.1, 512, 1), arrival(0.2, 512, 1), arrival(0.3, 256, 1)]
    fcfs, spf = (simulate(arrivals, policy_named(name), TIMES, "prefill=1,decode=1") for name in ("fcfs", "spf"))
    assert fcfs == pytest.approx([1.512, 3.024 - 0.1, 4.536 - 0.2, 5.792 - 0.3])
    assert spf == pytest.approx([1.512, 3.024 - 0.1, 5.792 - 0.2, 4.536 - 0.3])


def test_the_command_writes_the_same_figures_each_time(tmp_path, capsys):
    (tmp_path / "trace.csv").write_text(TRACE)
    reports = []
    for _ in range(2):
        code = policies.main(["--trace", str(tmp_path / "trace.csv"), "--json", str(tmp_path / "out.json")])
        assert code == 0
        reports.append((tmp_path / "out.json").read_text())
    assert reports[0] == reports[1]
    report = json.loads(reports[0])
    assert report["ttft"]["fcfs"]["p50_ratio"] == 1
    assert report["requests"] == 4
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["fcfs", "spf"] * 2


def test_percentiles_lie_between_the_values():
    assert figures([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.98))
