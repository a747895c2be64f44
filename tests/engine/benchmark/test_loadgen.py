"""The real LoadGen on a core that answers at once: what it issues is answered, recorded and judged."""

import subprocess
import sys
from contextlib import closing
from itertools import pairwise

import pytest
from helpers.fake_core import FakeCore, make_fake
from twinmesh import LLM
from twinmesh.engine.api.client import EngineClient
from twinmesh.engine.benchmark.loadgen import run_loadgen, samples_of
from twinmesh.engine.benchmark.loadgen_log import check_in_force, notes_of, read_log
from twinmesh.engine.benchmark.loadgen_settings import MODELS, Limits, expect, limits_of, shorten
from twinmesh.engine.simulation.loads.lengths import Uniform

lg = pytest.importorskip("mlperf_loadgen", reason="needs LoadGen: pip install 'twinmesh[loadgen]'")

LIMITS = "from twinmesh.engine.benchmark.loadgen_settings import load_settings as of\n"


def run(program, *arguments):
    """Run a program in a process of its own, since LoadGen reads its configuration once; return what it says."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # no signal
    return done.stdout + done.stderr


def settings_of(scenario, *, queries=12, samples=6, rate=400.0):
    """Settings that need no configuration file, which only one test of a process could read."""
    settings = lg.TestSettings()
    settings.scenario, settings.mode = getattr(lg.TestScenario, scenario), lg.TestMode.PerformanceOnly
    settings.use_token_latencies, settings.ttft_latency, settings.tpot_latency = True, 10**9, 10**9
    settings.min_duration_ms, settings.min_query_count = 20, queries
    settings.performance_sample_count_override = samples
    expect(settings, rate)
    return settings


def run_on(core, scenario, folder, settings=None):
    with closing(make_fake(LLM, core)) as llm:
        samples = samples_of(Uniform((4, 9), (2, 3)), 6, 64)
        return run_loadgen(
            EngineClient(llm.engine, 0), settings or settings_of(scenario), scenario, samples, folder, {}
        ), samples


def test_limits_are_those_of_loadgens_own_configuration():
    program = LIMITS + "import sys; print(tuple(of(sys.argv[1], 'Server')[1]))"
    said = [run(program, model) for model in MODELS]
    assert said == [
        "(2000.0, 100.0, 0.99, 600.0, 100, 13368)\n",
        "(500.0, 30.0, 0.99, 600.0, 100, 13368)\n",
        "(3000.0, 80.0, 0.99, 600.0, 100, 6396)\n",
        "(2000.0, 15.0, 0.99, 600.0, 100, 6396)\n",
    ]


def test_defaults_of_an_unknown_model_or_a_second_configuration_are_refused():
    assert "no limits for tokens of model 'llama9'" in run(LIMITS + "of('llama9', 'Server')")
    twice = LIMITS + "of('gpt-oss-120b', 'Server')\nof('llama3_1-8b', 'Server')"
    assert "no limits for tokens of model 'llama3_1-8b' in force" in run(twice)


def test_scale_shortens_duration_queries_and_samples():
    settings = settings_of("Server", queries=100, samples=13368)
    shorten(settings, 0.001)
    assert limits_of(settings) == Limits(1000.0, 1000.0, 0.99, 0.001, 1, 14)


@pytest.mark.parametrize("scenario", ["Server", "Offline"])
def test_whatever_loadgen_issues_is_answered_and_recorded(scenario, tmp_path):
    (driven, log), samples = run_on(FakeCore(answers=True), scenario, tmp_path)
    records = sorted(driven.records, key=lambda one: one.number)
    issued = log.values["generated_query_count"] * log.values["generated_samples_per_query"]
    assert len(records) == issued >= 12
    assert {(one.prompt_len, one.output_len) for one in records} <= {(w.prompt_len, w.output_len) for w in samples}
    assert {one.reason for one in records} == {"length"}
    arrivals = [one.arrival for one in records]
    if scenario == "Server":
        assert all(a < b for a, b in pairwise(arrivals))
        tokens = sum(one.output_len for one in records)
        rate = log.values["result_completed_tokens_per_second"] / log.values["result_completed_samples_per_sec"]
        assert rate == pytest.approx(tokens / (issued - 1), rel=0.15)  # by its own wall time of each
    else:
        assert len(set(arrivals)) == 1


def test_a_short_server_run_is_not_valid_and_says_why(tmp_path):
    (_, log), _ = run_on(FakeCore(answers=True), "Server", tmp_path)
    assert not log.is_valid
    assert "not satisfied: early stopping" in log.why_not
    first, *_ = notes_of(log)
    assert first.startswith("LoadGen 6.0.17")
    assert ", Server: INVALID; not satisfied: " in first


def test_another_limit_in_force_is_noticed(tmp_path):
    (_, log), _ = run_on(FakeCore(answers=True), "Server", tmp_path)
    limits = limits_of(settings_of("Server"))
    check_in_force(log, "Server", limits)
    with pytest.raises(ValueError, match="requested_server_tpot_latency 1000000000 in force, not 15000000"):
        check_in_force(log, "Server", limits._replace(tpot_ms=15.0))
    with pytest.raises(ValueError, match="effective_scenario 'Server' in force, not 'Offline'"):
        check_in_force(log, "Offline", limits)


def test_failed_requests_are_records_of_failures_while_loadgen_goes_on(tmp_path):
    class Failing(FakeCore):
        def answer(self, submission):
            if submission.facts.id % 3:
                super().answer(submission)
            else:
                self.send(submission.facts.id, finish_reason="error", error="the mesh is lost.")

    (driven, log), _ = run_on(Failing(answers=True), "Server", tmp_path)
    failed = [one for one in driven.records if one.reason == "error"]
    assert len(failed) == -(-len(driven.records) // 3) == driven.errors["the mesh is lost."]
    assert any(one.startswith("error: ") for one in log.why_not)  # an answer of no tokens is one for LoadGen


def test_an_engine_that_ends_ends_the_run_although_loadgen_cannot(tmp_path):
    program = """
import sys, pathlib
from test_loadgen import *
from twinmesh.engine.errors import EngineError
class Ending(FakeCore):
    def submit(self, submissions, *, may_refuse=False):
        self.is_closed = len(self.batches) == 3
        super().submit(submissions, may_refuse=may_refuse)
settings = settings_of("Server", queries=2000, rate=50.0)
try:
    run_on(Ending(answers=True), "Server", pathlib.Path(sys.argv[1]), settings)
except EngineError as error:
    print(error)
"""
    paths = f"import sys; sys.path[:0] = {[str(p) for p in sys.path]!r} + [{str(__file__).rpartition('/')[0]!r}]"
    assert run(f"{paths}\n{program}", str(tmp_path)) == "the engine is closed: make a new LLM.\n"


LOG = """\
:::MLLOG {"key": "loadgen_version", "value": "6.0.17 @ x", "metadata": {"is_error": false}}
not for readers
:::MLLOG {"key": "effective_scenario", "value": "Offline", "metadata": {"is_error": false}}
:::MLLOG {"key": "result_samples_per_second", "value": 1234.5, "metadata": {"is_error": false}}
:::MLLOG {"key": "result_99.00_percentile_latency_ns", "value": 2500000, "metadata": {"is_error": false}}
"""
VALID = ':::MLLOG {"key": "result_validity", "value": "VALID", "metadata": {"is_error": false}}\n'


def test_a_valid_log_is_one_without_errors(tmp_path):
    path = tmp_path / "mlperf_log_detail.txt"
    path.write_text(LOG + VALID)
    log = read_log(tmp_path)
    assert log.is_valid
    assert list(notes_of(log)) == [
        "LoadGen 6.0.17 @ x, Offline: VALID", "LoadGen's figures: E2E P99 2.5 ms",
        "LoadGen's rates: 1,234.50 samples/s",
    ]  # fmt: skip
    path.write_text(LOG + VALID + ':::MLLOG {"key": "e", "value": "lost", "metadata": {"is_error": true}}\n')
    assert read_log(tmp_path).why_not == ("error: lost",)
    path.write_text(LOG)
    with pytest.raises(ValueError, match="the run did not come to its end"):
        read_log(tmp_path)


def test_a_sample_that_loadgen_or_the_engine_cannot_take_is_refused():
    with pytest.raises(ValueError, match="answers need 2 tokens or more"):
        samples_of(Uniform((4, 4), (1, 1)), 1, 64)
    with pytest.raises(ValueError, match=r"request 0 of the data set has 60 prompt and 9 output tokens"):
        samples_of(Uniform((60, 60), (9, 9)), 1, 64)
