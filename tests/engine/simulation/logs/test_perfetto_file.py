"""Traces are read again by the format's own protos."""

import pytest

pytest.importorskip("perfetto")
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from twinmesh.engine.simulation.logs.perfetto_file import trace_bytes
from twinmesh.engine.simulation.logs.timeline_tracks import Slice, Track

MESH = Track("mesh 0", "meshes", 0)


def test_slices_nest_and_arrows_have_both_ends():
    outer, inner = Slice(MESH, "outer", 1.0, 3.0, (("rows", 4),), (7,)), Slice(MESH, "inner", 1.0, 2.0, (), (), (7,))
    trace = Trace.FromString(trace_bytes([inner, outer, Slice(MESH, "next", 3.0, 4.0)]))
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    assert [(one.timestamp, one.track_event.name) for one in events] == [
        (0, "outer"), (0, "inner"), (10**9, ""), (2 * 10**9, ""), (2 * 10**9, "next"), (3 * 10**9, ""),
    ]  # fmt: skip
    assert [one.track_event.type for one in events].count(TrackEvent.TYPE_SLICE_END) == 3
    assert list(events[0].track_event.flow_ids) == list(events[1].track_event.terminating_flow_ids) == [7]
    names = {one.track_descriptor.uuid: one.track_descriptor.name for one in trace.packet}
    assert {names[one.track_event.track_uuid] for one in events} == {"mesh 0"}
