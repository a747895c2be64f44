"""A Perfetto trace, read again by the format's own protos: its tracks, and what is on them."""

from collections import defaultdict
from dataclasses import dataclass, field

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent


@dataclass
class Slice:
    path: tuple[str, ...]  # names of its track and those above it, the highest first
    track: int
    name: str
    begin: int  # nanoseconds
    depth: int
    end: int | None = None
    flows_out: list[int] = field(default_factory=list)
    flows_in: list[int] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)


class ParsedTrace:
    """Raises AssertionError where marks of a track are out of order, slices do not nest, or one does not end."""

    def __init__(self, data):
        self.slices, self.instants, self.counts = [], [], defaultdict(list)
        self.ranks = {}
        self._paths, self._open, self._last = {}, defaultdict(list), defaultdict(int)
        for packet in Trace.FromString(data).packet:
            if packet.HasField("track_descriptor"):
                self._describe(packet.track_descriptor)
            else:
                assert packet.HasField("track_event")
                self._take(packet)
        assert not any(self._open.values()), "a slice does not end"

    def on(self, *path):
        return [one for one in self.slices if one.path == path]

    def named(self, name):
        return [one for one in self.slices if one.name == name]

    def _describe(self, track):
        assert track.uuid not in self._paths
        above = self._paths[track.parent_uuid] if track.HasField("parent_uuid") else ()
        self._paths[track.uuid] = (*above, track.name)
        self.ranks[self._paths[track.uuid]] = track.sibling_order_rank

    def _take(self, packet):
        event, kinds = packet.track_event, TrackEvent
        track, t = event.track_uuid, packet.timestamp
        assert t >= self._last[track], "marks of a track are out of order"
        self._last[track] = t
        stack, notes = self._open[track], {one.name: _value(one) for one in event.debug_annotations}
        if event.type == kinds.TYPE_SLICE_BEGIN:
            flows = list(event.flow_ids), list(event.terminating_flow_ids)
            stack.append(Slice(self._paths[track], track, event.name, t, len(stack), None, *flows, notes))
            self.slices.append(stack[-1])
        elif event.type == kinds.TYPE_SLICE_END:
            ended = stack.pop()
            ended.end = t
            ended.notes |= notes
        elif event.type == kinds.TYPE_INSTANT:
            self.instants.append(Slice(self._paths[track], track, event.name, t, len(stack), t, notes=notes))
        else:
            assert event.type == kinds.TYPE_COUNTER
            self.counts[self._paths[track]].append((t, event.double_counter_value))


def _value(note):
    return getattr(note, note.WhichOneof("value"))
