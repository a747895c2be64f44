"""Timelines of logged runs, read again by Perfetto's own protos and held against the log."""

import io
from itertools import islice, pairwise

import pytest
from helpers.logged_runs import COSTS, config_of, engine_of, mixed_load, opened, simulated
from helpers.perfetto_trace import ParsedTrace
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.roles import starting_roles
from twinmesh.engine.scheduler.cost_model import ProgramCost
from twinmesh.engine.scheduler.decision_log import DecisionLog
from twinmesh.engine.simulation.incidents import Aborted, MeshFails, RolesCalled
from twinmesh.engine.simulation.logs.logged_run import read_run
from twinmesh.engine.simulation.logs.perfetto_file import trace_pieces, write_trace
from twinmesh.engine.simulation.logs.timeline import timeline
from twinmesh.engine.simulation.simulator import simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Topology


def parsed(text):
    return ParsedTrace(b"".join(trace_pieces(timeline(opened(text)))))


def nanoseconds(t):
    return round(t * 1e9)


@pytest.fixture(scope="module")
def text():
    """A run with hand-offs, pages that run short, a mesh that fails and requests that are aborted."""
    on = engine_of(config_of("prefill=1,decode=2", max_num_seqs=4), pages=140)
    incidents = [MeshFails(0.7, 2, 0.2), Aborted(0.5, 9), Aborted(0.9, 20)]
    return simulated(on, mixed_load(60, rate=40.0), incidents=incidents)[0]


@pytest.fixture(scope="module")
def run(text):
    return read_run(opened(text))


@pytest.fixture(scope="module")
def trace(text):
    return parsed(text)


def test_every_step_that_was_read_lies_where_its_stamps_say_and_no_other(trace, run):
    expected = [
        (step.action.mesh, step.action.step, nanoseconds(step.stamps.begun), nanoseconds(step.stamps.done))
        for step in run.steps
        if step.stamps is not None
    ]
    steps = [one for one in trace.slices if one.path[-1] == "steps"]
    drawn = [(int(one.path[0][5]), one.notes["step"], one.begin, one.end) for one in steps]
    assert len(expected) > 100
    assert sorted(drawn) == sorted(expected)


def test_a_step_says_what_it_held(trace, run):
    drawn = {(one.path[0], one.notes["step"]): one for one in trace.slices if one.path[-1] == "steps"}
    for step in run.steps:
        one = drawn.get((f"mesh {step.action.mesh}: {'decode' if step.action.mesh else 'prefill'}", step.action.step))
        if one is not None:
            assert one.name == type(step.action).__name__.lower()
            assert one.notes["bucket"] == step.action.bucket
            assert (one.notes["chunks"], one.notes["rows"]) == (len(step.chunks), len(step.rows))


def test_every_transfer_flows_from_its_source_to_its_destination(trace, run):
    out = {flow: one for one in trace.slices for flow in one.flows_out}
    into = {flow: one for one in trace.slices for flow in one.flows_in}
    assert sum(len(one.flows_out) for one in trace.slices) == len(out)
    assert out.keys() == into.keys()
    assert len(out) == len(run.transfers) > 40
    for stamps in run.transfers:
        source, destination = out[stamps.transfer + 1], into[stamps.transfer + 1]
        assert (source.path[0][:6], source.path[1]) == (f"mesh {stamps.source}", "sends")
        assert (destination.path[0][:6], destination.path[1]) == (f"mesh {stamps.destination}", "receives")
        assert (source.begin, source.end) == (nanoseconds(stamps.sent), nanoseconds(stamps.arrived))
        assert destination.begin == source.end
        assert destination.notes["then"] in ("scattered", "dropped")
        assert source.notes["bytes"] == stamps.size
        assert source.name.split(" to ")[0] == destination.name.split(" from ")[0]


def test_the_phases_of_every_request_follow_each_other_from_arrival_to_end_as_the_log_has_them(trace, run):
    wholes = {int(one.name.split()[1]): one for one in trace.slices if one.path[-1] == "requests" and not one.depth}
    assert wholes.keys() == run.requests.keys()
    for id_, request in run.requests.items():
        whole = wholes[id_]
        phases = [
            one for one in trace.slices
            if one.track == whole.track and one.depth and whole.begin <= one.begin and one.end <= whole.end
        ]  # fmt: skip
        assert (whole.begin, whole.end) == (nanoseconds(request.arrival), nanoseconds(request.finish))
        assert (phases[0].begin, phases[-1].end) == (whole.begin, whole.end)
        assert all(a.end == b.begin for a, b in pairwise(phases))
        assert (whole.notes["ended"], whole.notes["generated tokens"]) == (request.reason, request.tokens)
        begun = [one.begin for one in phases if one.name == "prefill"]
        assert begun[:1] == [nanoseconds(t) for t in (request.prefill_start,) if t is not None]


def test_a_hand_off_lies_between_first_token_and_decode(trace, run):
    request = next(one for one in run.requests.values() if one.tokens > 5 and len(one.steps) == 1)
    (whole,) = trace.named(f"request {request.facts.id}")
    phases = {
        one.name: one for one in trace.slices if one.track == whole.track and whole.begin <= one.begin < whole.end
    }
    assert phases["prefill"].end == phases["hand-off"].begin == nanoseconds(request.first_token)
    assert phases["hand-off"].end == phases["decode"].begin
    assert phases["decode"].notes["mesh"] in (1, 2)


def test_requests_that_start_over_are_queued_again_and_failures_are_marked(trace):
    again = [one for one in trace.named("queued") if "starts over" in one.notes]
    assert again
    assert all(one.end > one.begin for one in trace.named("decode"))
    (failed,) = [one for one in trace.instants if one.name == "mesh failed"]
    assert failed.path == ("mesh 2: decode", "steps")
    assert failed.begin == nanoseconds(0.7)


def test_counters_follow_arrivals_and_ends_and_come_to_rest(trace, run):
    waiting, running = (trace.counts[name,] for name in ("waiting", "running"))
    assert waiting[-1][1] == running[-1][1] == 0
    assert max(value for _, value in running) <= 3 * 4
    assert max(value for _, value in waiting) > 3
    for mesh in ("mesh 0: prefill", "mesh 1: decode", "mesh 2: decode"):
        shares = [value for _, value in trace.counts[mesh, "KV pages in use"]]
        assert shares[-1] == 0
        assert 50 < max(shares) <= 100


def test_tracks_stand_in_groups_and_in_order(trace):
    top = sorted((rank, path) for path, rank in trace.ranks.items() if len(path) == 1)
    assert [path[0] for _, path in top] == [
        "waiting", "running", "requests", "mesh 0: prefill", "mesh 1: decode", "mesh 2: decode",
    ]  # fmt: skip


def test_roles_flips_and_plans_have_their_reasons():
    slo = SLO(ttft_ms=5000, tpot_ms=80, percentile=90)
    topology = Topology.parse("pool=4")
    config = config_of("pool=4", slo=slo, roles=starting_roles("prefill=2,decode=2", topology))
    costs = replace_costs(prefill=1.2, decode=0.05)
    work = [WorkRequest(500, 4, at=number / 1.5) for number in range(45)]
    called = RolesCalled(0.5, "prefill=1,decode=3")
    text, done = simulated(engine_of(config, costs=costs), Workload("planned", work), incidents=[called])
    trace = parsed(text)
    flips = [one for one in trace.instants if " to " in one.name]
    assert len(flips) == len(done.flips) > 1
    assert [(one.begin, one.notes["reason"]) for one in flips] == [(nanoseconds(f.t), f.reason) for f in done.flips]
    assert {one.notes["reason"] for one in flips} > {"called for"}
    plans = [one for one in trace.instants if one.name.startswith("plan: ")]
    assert len(plans) > 5
    assert all(one.notes["means"] and one.notes["roles"] for one in plans)
    last = [trace.on(f"mesh {mesh}", "role")[-1] for mesh in range(4)]
    assert [one.name for one in last] == list(done.metrics.roles)
    assert "called for prefill=1, decode=3" in [one.name for one in trace.instants]


def replace_costs(prefill, decode):
    steps = {size: ProgramCost(prefill) for size in COSTS.prefill}
    rows = {size: ProgramCost(decode) for size in COSTS.decode}
    return type(COSTS)(steps, rows, steps, COSTS.link, COSTS.host)


def test_a_log_that_was_cut_is_drawn_up_to_there_with_every_slice_ended(text):
    lines = text.splitlines(keepends=True)
    for cut in range(len(lines) // 3, len(lines), len(lines) // 7):
        trace = parsed("".join(lines[:cut]) + '{"torn')
        out = [flow for one in trace.slices for flow in one.flows_out]
        assert sorted(out) == sorted(flow for one in trace.slices for flow in one.flows_in)
        assert any(one.notes.get("ended") == "the log ends" for one in trace.slices)


def test_a_log_is_read_and_written_piece_by_piece(text):
    lines, read = text.splitlines(keepends=True), 0

    def reading():
        nonlocal read
        for line in lines:
            read += 1
            yield line

    marks = timeline(reading())
    assert len(list(islice(marks, 40))) == 40
    assert read < len(lines) / 10
    pieces = trace_pieces(marks)
    sizes = [len(next(pieces))]
    assert read < len(lines) / 2
    sizes += [len(piece) for piece in pieces]
    assert len(sizes) > 2
    assert max(sizes) < sum(sizes) / 2


def test_what_was_drawn_is_forgotten(text):
    """Nothing is held of what is over."""
    marks = timeline(opened(text))
    first = next(marks)
    drawing = marks.gi_frame.f_locals["drawing"]
    at_most = max(_held(drawing) for _ in marks)
    assert first.name == "request 0"
    assert at_most > 10
    assert _held(drawing) == 0


def _held(drawing):
    """Count what the parts of a drawing hold in dictionaries, of any kind."""
    parts = [part for part in vars(drawing).values() if hasattr(part, "happened")]
    meshes = [mesh for part in parts for mesh in vars(part).get("_meshes", ()) if hasattr(mesh, "in_flight")]
    return sum(len(value) for one in (*parts, *meshes) for value in vars(one).values() if isinstance(value, dict))


def test_a_log_without_stamps_or_requests_is_refused_in_a_sentence(tmp_path):
    file = io.StringIO()
    simulate(mixed_load(5), engine_of(config_of("both=1")), log=DecisionLog(file))
    with pytest.raises(ValueError, match=r"run\.log has no times of requests and steps"):
        write_trace(tmp_path / "trace", timeline(opened(file.getvalue())))
    text, _ = simulated(engine_of(config_of("both=1")), mixed_load(5))
    with pytest.raises(ValueError, match=r"run\.log has no request: there is nothing to draw"):
        write_trace(tmp_path / "trace", timeline(opened(text.splitlines(keepends=True)[0])))
    assert not list(tmp_path.iterdir())
