"""Where the time to a first token went: the parts of it, and what stood idle."""

import io

import pytest
from helpers.core_engine import greedy, make_engine, model_with_windows, prompts_of
from helpers.logged_runs import config_of, engine_of, mixed_load, opened, simulated
from twinmesh.engine.simulation.logs.explain import PARTS, explain, worst
from twinmesh.engine.simulation.logs.explain_text import WIDTH, as_text
from twinmesh.engine.simulation.logs.logged_run import read_run
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.engine.simulation.workload import Workload, WorkRequest


def explained(text, *ids):
    run = read_run(opened(text))
    return explain(run, opened(text), ids or list(run.requests))


def of(requests, topology="both=1", *, pages=300, costs=None, **changes):
    """Explain all of a simulated load, by number."""
    config = config_of(topology, **changes)
    engine = engine_of(config, pages) if costs is None else engine_of(config, pages, costs)
    return explained(simulated(engine, Workload("few", requests, 16))[0])


@pytest.mark.parametrize(
    ("topology", "pages"),
    [
        ("both=2", 70),
        ("prefill=1,decode=1", 300),
        ("prefill=1,decode=1", 70),
        ("both(mode=fused)=1", 70),
        ("pool=3", 70),
    ],
)
def test_the_parts_of_every_simulated_request_add_up(topology, pages):
    text, result = simulated(engine_of(config_of(topology), pages), mixed_load(30, 60.0))
    times = {record.number: record.ttft for record in result.records}
    found = explained(text)
    assert len(found) == 30
    for one in found:
        assert one.ttft == pytest.approx(times[one.request_id], abs=1e-9)
        assert sum(one.parts.values()) == pytest.approx(one.ttft, abs=1e-9)
        assert one.parts.keys() <= PARTS.keys()
        assert one.parts["compute"] > 0


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The log of a real engine: prompts in chunks, hand-offs, too few pages for all, a conversation, and a batch that
    keeps two at once."""
    path = tmp_path_factory.mktemp("log") / "run.log"
    prompts = prompts_of(40, 9, 33, 20, 50, 12)
    with make_engine(model_with_windows(None), "prefill=1,decode=1", decision_log=path) as llm:
        llm.generate(prompts, greedy(8))
        for turn in (prompts[0], [*prompts[0], 5, 6, 7]):
            llm.generate(turn, greedy(4), session="talk")
        jobs = [(prompt, greedy(6)) for prompt in prompts]
        assert len(list(llm.as_completed(jobs, window=2))) == 6
    return path


def test_the_parts_of_every_request_of_a_real_run_add_up(log):
    run = read_run(log)
    found = explain(run, log, list(run.requests))
    assert len(found) == 14
    timelines = {len(timeline.tokens): timeline for timeline in replay(log).ended.recent}
    assert {8, 4, 6} <= timelines.keys()
    for one in found:
        assert abs(sum(one.parts.values()) - one.ttft) < 1e-6
        assert all(seconds > 0 for seconds in one.parts.values())
        assert one.delivered > 0
    assert sum("prompts" in one.parts or "seat" in one.parts or "pages" in one.parts for one in found) > 2


def test_times_to_first_token_are_those_that_the_engine_reports(log):
    times = sorted(timeline.ttft for timeline in replay(log).ended.recent)
    run = read_run(log)
    assert sorted(one.ttft for one in explain(run, log, list(run.requests))) == pytest.approx(times, abs=1e-9)


def test_a_line_of_a_batch_waits_for_the_end_of_another(log):
    run = read_run(log)
    waited = [request for request in run.requests.values() if request.stamps.after is not None]
    assert len(waited) == 4  # of six, two at once
    for request in waited:
        assert run.requests[request.stamps.after].finish <= request.called
        (one,) = explain(run, log, [request.facts.id])
        assert one.parts.get("turn", 0.0) > 0


def test_a_prompt_behind_another_names_it():
    requests = [WorkRequest(900, 2, 0.0), WorkRequest(10, 2, 0.001)]
    first, second = of(requests, prefill_rows=1)
    assert first.behind == ()
    assert [(one.request_id, one.tokens) for one in second.behind] == [(0, 900)]
    assert second.parts["prompts"] == pytest.approx(second.behind[0].seconds)
    assert second.parts["prompts"] > 4 * second.parts["compute"]


def test_decode_steps_between_chunks_are_told_from_chunks():
    requests = [WorkRequest(16, 200, 0.0), WorkRequest(1500, 2, 0.3)]
    _, long = of(requests)
    assert long.chunks == 3
    assert long.parts["decode"] > 2 * 8e-3
    assert "prompts" not in long.parts


def test_a_seat_pages_and_a_shared_beginning_are_told_apart():
    many = [WorkRequest(10, 40, 0.0) for _ in range(9)]
    *_, last = of(many)
    assert last.parts["seat"] > 0.3
    *_, last = of([WorkRequest(1000, 40, 0.0), WorkRequest(1000, 2, 0.0)], pages=90)
    assert last.parts["pages"] > 0.3
    alike = [WorkRequest(1600, 2, t, blocks=(*range(100), 100 + i)) for i, t in enumerate((0.0, 0.01))]
    *_, last = of(alike)
    assert last.parts["prefix"] > 0.05
    assert last.prefix_of == (0,)
    assert last.cached == 1600


def test_credit_is_what_prompts_wait_for_that_find_no_page_behind_a_full_decode_mesh():
    requests = [WorkRequest(700, 60, 0.0) for _ in range(6)]
    found = of(requests, "prefill=1,decode=1", pages=100)
    assert max(one.parts.get("credit", 0.0) for one in found) > 0.3


def test_a_mesh_that_stood_idle_is_found_and_utilisation_is_beside_it():
    """A prompt goes where its beginning is cached and waits there, while the other mesh has nothing to do."""
    alike = [(*range(53), number) for number in range(2)]
    requests = [
        WorkRequest(850, 2, 0.0, blocks=alike[0]), WorkRequest(300, 2, 1.0), WorkRequest(860, 2, 1.0, blocks=alike[1]),
    ]  # fmt: skip
    first, _, last = of(requests, "both=2", prefill_rows=1)
    assert (first.idle, first.idle_mesh) == (0.0, None)
    assert last.cached == 53 * 16
    assert last.idle == pytest.approx(last.parts["prompts"] + last.parts["decode"])
    assert last.idle > 0.02
    assert last.idle_mesh == 1 - last.mesh
    assert last.mesh_utilisation[last.mesh] == pytest.approx(1.0)
    assert last.mesh_utilisation[last.idle_mesh] == 0
    assert last.utilisation == pytest.approx(0.5)


def test_the_worst_come_first_and_the_page_fits():
    text, _ = simulated(engine_of(config_of("both=2")), mixed_load(30))
    run = read_run(opened(text))
    found = explain(run, opened(text), worst(run, 3))
    assert [one.ttft for one in found] == sorted((one.ttft for one in explained(text)), reverse=True)[:3]
    page = as_text(found)
    assert max(map(len, page.splitlines())) <= WIDTH
    assert page.count("first token after") == 3


def test_unknown_requests_and_those_without_a_token_are_refused():
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(count=4))
    run = read_run(opened(text))
    with pytest.raises(ValueError, match=r"^run\.log has no request 77: it has 4, from 0 to 3\.$"):
        explain(run, opened(text), [77])
    arrived = [i for i, line in enumerate(text.splitlines()) if '"Arrived"' in line][1]
    torn = "\n".join(text.splitlines()[: arrived + 1]) + '\n["StepSta'
    with pytest.raises(ValueError, match="request 1 has no first token"):
        explained(torn, 1)


def test_logs_without_stamps_and_of_other_versions_are_refused_by_name():
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(count=2))
    with pytest.raises(ValueError, match=r"^old\.log is a decision log of version 4, and this"):
        read_run(opened(text.replace('"version":5', '"version":4'), "old.log"))
    header, rest = text.split("\n", 1)
    bare = header[: header.index(',"run":')] + "}\n" + rest
    with pytest.raises(ValueError, match=r"^bare\.log has no times of requests and steps: "):
        read_run(opened(bare, "bare.log"))
    with pytest.raises(ValueError, match="has no request"):
        read_run(io.StringIO(header + "\n"))
