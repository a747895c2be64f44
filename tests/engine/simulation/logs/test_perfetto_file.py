"""Traces are read again by the format's own protos."""

import pytest
from helpers.perfetto_trace import ParsedTrace
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackDescriptor
from twinmesh.engine.simulation.logs.perfetto_file import trace_pieces, write_trace
from twinmesh.engine.simulation.logs.timeline_tracks import Begin, Count, End, Instant, Lanes, Track

GROUP = Track("group", None, 3)
ROW = Track("row", GROUP, 2)
AMOUNT = Track("amount", GROUP, 1, "pages")


def test_slices_instants_counters_and_flows_are_what_was_marked():
    marks = [
        Begin(ROW, 1.0, "outer", (("rows", 4), ("share", 0.5), ("why", "so")), flow_out=7),
        Begin(ROW, 1.0, "inner", flow_in=7),
        Instant(ROW, 1.5, "now", (("n", 1),)),
        Count(AMOUNT, 1.25, 0.5),
        End(ROW, 2.0),
        End(ROW, 2.0, (("late", "yes"),)),
    ]
    trace = ParsedTrace(b"".join(trace_pieces(marks)))
    outer, inner = trace.slices
    assert (outer.path, outer.begin, outer.end, outer.depth) == (("group", "row"), 10**9, 2 * 10**9, 0)
    assert outer.notes == {"rows": 4, "share": 0.5, "why": "so", "late": "yes"}
    assert (inner.depth, outer.flows_out, inner.flows_in) == (1, [7], [7])
    assert [(one.name, one.begin, one.notes) for one in trace.instants] == [("now", 1_500_000_000, {"n": 1})]
    assert trace.counts == {("group", "amount"): [(1_250_000_000, 0.5)]}
    assert trace.ranks == {("group",): 3, ("group", "row"): 2, ("group", "amount"): 1}


def test_each_track_is_a_sequence_of_its_own_and_is_described_before_it_is_used():
    marks = [Begin(ROW, 5.0, "late"), End(ROW, 6.0), Count(AMOUNT, 1.0, 2.0)]
    packets = Trace.FromString(b"".join(trace_pieces(marks))).packet
    uuids = [one.track_descriptor.uuid or one.track_event.track_uuid for one in packets]
    assert uuids == [one.trusted_packet_sequence_id for one in packets] == [1, 2, 2, 2, 3, 3]
    described = [one.track_descriptor for one in packets if one.HasField("track_descriptor")]
    assert all(one.child_ordering == TrackDescriptor.EXPLICIT for one in described)
    assert described[2].counter.unit_name == "pages"


def test_a_trace_that_fails_on_the_way_leaves_no_file(tmp_path):
    def marks():
        yield from [Begin(ROW, 1.0, "slice"), End(ROW, 2.0)] * 2000
        raise ValueError("the log is damaged.")

    with pytest.raises(ValueError, match="damaged"):
        write_trace(tmp_path / "trace", marks())
    assert not list(tmp_path.iterdir())


def test_a_lane_is_for_one_at_a_time_and_the_first_free_one_is_taken():
    lanes = Lanes("requests", GROUP, 0)
    first, second = lanes.take(0.0), lanes.take(0.0)
    assert first.track is not second.track
    assert first.track.name == second.track.name
    lanes.give_back(second, 1.0)
    lanes.give_back(first, 5.0)
    assert lanes.take(2.0) is second  # the first is not free yet at that time
    assert lanes.take(5.0) is first
    assert lanes.take(9.0) not in (first, second)
