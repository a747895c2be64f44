"""A real engine as Prometheus and Perfetto see it."""

import gc

import pytest
from helpers.core_engine import Pause, greedy, make_engine, model_with_windows, prompts_of
from helpers.perfetto_trace import ParsedTrace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from twinmesh.engine.errors import EngineError
from twinmesh.engine.simulation.logs.perfetto_file import trace_pieces
from twinmesh.engine.simulation.logs.timeline import timeline


def read(text):
    families = text_string_to_metric_families(text)
    return {
        (one.name, *(one.labels[name] for name in sorted(one.labels))): one.value
        for family in families
        for one in family.samples
    }


def nanoseconds(t):
    return round(t * 1e9)


def test_a_run_shows_in_the_text_while_it_goes_on_and_in_a_timeline_afterwards(tmp_path):
    path = tmp_path / "run.log"
    llm = make_engine(model_with_windows(None, 6), "prefill=1,decode=1", room=4, decision_log=str(path))
    outputs = llm.generate(prompts_of(5, 9, 20, 30), greedy(6))
    found, lines = read(llm.metrics_text()), [output.timeline for output in outputs]
    assert found["twinmesh_requests_total", "length"] == 4
    assert found["twinmesh_generated_tokens_total",] == 24
    assert found["twinmesh_handoffs_total", "1", "0"] == llm.metrics().handoffs >= 4
    assert found["twinmesh_steps_total", "prefill", "0"] > 0
    assert found["twinmesh_steps_total", "decode", "1"] >= 5
    assert found["twinmesh_steps_total", "decode", "0"] == 0
    assert found["twinmesh_mesh_busy_seconds_total", "1"] > 0
    for mesh, role in enumerate(("prefill", "decode")):
        assert found["twinmesh_mesh_role", str(mesh), role] == 1
        assert found["twinmesh_kv_pages", "0", str(mesh), "used"] == 0
    assert found["twinmesh_inter_token_latency_seconds_count",] == 20
    for name, values in {
        "time_to_first_token_seconds": [line.ttft for line in lines],
        "inter_token_latency_seconds": [gap for line in lines for gap in line.itl],
        "e2e_request_latency_seconds": [line.e2e for line in lines],
        "request_handoff_seconds": [line.handoff for line in lines],
    }.items():
        assert found[f"twinmesh_{name}_sum",] == pytest.approx(sum(values), abs=1e-6)

    registry = CollectorRegistry(auto_describe=True)
    registry.register(llm.metrics_collector())
    pause = Pause(llm, lambda requests: any(request.confirmed > 2 for request in requests))
    stream = llm.stream(prompts_of(7)[0], greedy(20))
    with pause:
        during = read(generate_latest(registry).decode())
    stream.result()
    assert during["twinmesh_time_to_first_token_seconds_count",] == 5  # before it has ended
    assert during["twinmesh_requests_total", "length"] == 4
    assert (during["twinmesh_requests_running",], during["twinmesh_requests_waiting",]) == (1, 0)
    assert 24 < during["twinmesh_generated_tokens_total",] < 24 + 20
    assert during["twinmesh_kv_pages", "0", "1", "used"] > 0

    core = llm.engine.core
    del llm, stream, pause
    gc.collect()
    core.close()
    with pytest.raises(EngineError, match="closed"):
        core.check_health()
    after = read(generate_latest(registry).decode())  # which has not kept the engine alive
    assert after["twinmesh_requests_total", "length"] == 5
    grows = [name for name in found if name[0].endswith(("_total", "_bucket", "_sum"))]
    assert all(found[name] <= during[name] <= after[name] for name in grows)

    trace = ParsedTrace(b"".join(trace_pieces(timeline(path))))
    for id_, (output, line) in enumerate(zip(outputs, lines, strict=True)):
        (whole,) = trace.named(f"request {id_}")
        assert (whole.begin, whole.end) == (nanoseconds(line.arrival), nanoseconds(line.finish))
        assert whole.notes["prompt tokens"] == len(output.prompt_token_ids)
        phases = {
            one.name: one for one in trace.slices if one.track == whole.track and whole.begin <= one.begin < whole.end
        }
        assert phases["prefill"].begin == nanoseconds(line.prefill_start)
        assert phases["prefill"].end == nanoseconds(line.first_token)
    assert len(trace.on("mesh 1: decode", "steps")) == after["twinmesh_steps_total", "decode", "1"]
    assert len([flow for one in trace.slices for flow in one.flows_in]) == after["twinmesh_handoffs_total", "1", "0"]
