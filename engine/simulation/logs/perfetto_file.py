"""Slices as a file of Perfetto's native format, by the protos that the package `perfetto` ships; ui.perfetto.dev opens
it. Times are nanoseconds from the first slice.

A track is a TrackDescriptor (uuid, name, parent_uuid; `sibling_order_rank` orders them), a slice a pair of TrackEvents
SLICE_BEGIN and SLICE_END on its `track_uuid`, in one packet sequence and in the order of time, an inner slice's end
before its outer's; what an arrow begins at has `flow_ids`, what it ends at `terminating_flow_ids`.
"""

from collections.abc import Iterable
from os import PathLike
from typing import Any

from ...extras import need
from ...whole_file import write_whole
from .timeline_tracks import Slice, Track

_SEQUENCE = 1  # id of the packet sequence that all packets are of


def write_trace(path: str | PathLike[str], slices: Iterable[Slice]) -> None:
    """Write a trace.

    Raises:
        ValueError: the package perfetto is not installed, or there are no slices.
        OSError: the file cannot be written.
    """
    write_whole(path, trace_bytes(list(slices)))


def trace_bytes(slices: list[Slice]) -> bytes:
    """Return a trace; raises as `write_trace`."""
    protos = need("perfetto.protos.perfetto.trace.perfetto_trace_pb2", "perfetto", "A Perfetto trace")
    if not slices:
        raise ValueError("the run has nothing to be drawn: no step of it has stamps.")
    trace, start = protos.Trace(), min(one.begin for one in slices)
    uuids = _describe(trace, protos, {one.track for one in slices})
    for time, _, event, one in sorted(_events(slices, start), key=lambda entry: entry[:2]):
        packet = _packet(trace)
        packet.timestamp = time
        packet.track_event.track_uuid = uuids[one.track]
        packet.track_event.type = getattr(protos.TrackEvent, event)
        if event == "TYPE_SLICE_BEGIN":
            _fill(packet.track_event, one)
    data: bytes = trace.SerializeToString()
    return data


def _events(slices: list[Slice], start: float) -> Iterable[tuple[int, tuple[int, int], str, Slice]]:
    """Yield begins and ends; at one instant ends come before begins, inner ends and outer begins first."""
    for one in slices:
        begin, end = (round((t - start) * 1e9) for t in (one.begin, one.end))
        yield begin, (1, begin - end), "TYPE_SLICE_BEGIN", one
        yield end, (0 if end > begin else 2, end - begin), "TYPE_SLICE_END", one


def _describe(trace: Any, protos: Any, tracks: set[Track]) -> dict[Track, int]:
    """Add the tracks, each under its group; return their uuids."""
    groups = sorted({track.group for track in tracks})
    for number, group in enumerate(groups, 1):
        descriptor = _packet(trace).track_descriptor
        descriptor.uuid, descriptor.name = number, group
    uuids = {}
    for number, track in enumerate(sorted(tracks, key=lambda one: (one.group, one.order)), len(groups) + 1):
        descriptor = _packet(trace).track_descriptor
        descriptor.uuid, descriptor.parent_uuid = number, groups.index(track.group) + 1
        descriptor.name, descriptor.sibling_order_rank = track.name, track.order
        uuids[track] = number
    return uuids


def _packet(trace: Any) -> Any:
    packet = trace.packet.add()
    packet.trusted_packet_sequence_id = _SEQUENCE
    return packet


def _fill(event: Any, one: Slice) -> None:
    event.name = one.name
    event.flow_ids.extend(one.flows_out)
    event.terminating_flow_ids.extend(one.flows_in)
    for name, value in one.notes:
        note = event.debug_annotations.add()
        note.name = name
        if isinstance(value, str):
            note.string_value = value
        elif isinstance(value, int):
            note.int_value = value
        else:
            note.double_value = value
