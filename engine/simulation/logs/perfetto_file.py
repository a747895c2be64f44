"""A timeline as a file of Perfetto's native format, by the protos that the package `perfetto` ships; ui.perfetto.dev
opens it. Times are nanoseconds on the engine's clock, those of the decision log.

A file is one `Trace`, whose packets are written a thousand at a time: protobuf's encoding of a repeated field is that
of its parts, one behind the other. A track is a TrackDescriptor (uuid, parent_uuid, name; `sibling_order_rank` orders
those of a parent whose `child_ordering` is EXPLICIT), a slice a pair of TrackEvents SLICE_BEGIN and SLICE_END on its
`track_uuid`; a flow leaves the slice with its number in `flow_ids` and ends at the one with it in
`terminating_flow_ids`. Packets of one sequence (`trusted_packet_sequence_id`) are read in their order, those of several
in the order of time, so each track is a sequence of its own.
"""

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from ...host.extras import need
from ...host.whole_file import writing_whole
from .timeline_tracks import Begin, Count, End, Instant, Mark, Notes, Track

_PACKETS = 1000  # that are written at once


def check_perfetto() -> None:
    """Refuse to go on without the package, before a long log is read.

    Raises:
        ValueError: it is not installed.
    """
    _protos()


def write_trace(path: str | PathLike[str], marks: Iterable[Mark]) -> None:
    """Write a trace; the file is there once it is whole.

    Raises:
        ValueError: the package perfetto is not installed; or what `marks` raises.
        OSError: the file cannot be written.
    """
    with writing_whole(path) as file:
        for piece in trace_pieces(marks):
            file.write(piece)


def trace_pieces(marks: Iterable[Mark]) -> Iterator[bytes]:
    """Yield a trace in pieces, which follow each other in the file; raises as `write_trace`."""
    packets = _Packets(_protos())
    for mark in marks:
        packets.add(mark)
        if packets.count >= _PACKETS:
            yield packets.take()
    if packets.count:
        yield packets.take()


class _Packets:
    """Packets that were not written yet."""

    def __init__(self, protos: Any) -> None:
        self._protos, self._trace = protos, protos.Trace()
        self._uuids: dict[Track, int] = {}
        self._types = {
            Begin: protos.TrackEvent.TYPE_SLICE_BEGIN,
            End: protos.TrackEvent.TYPE_SLICE_END,
            Instant: protos.TrackEvent.TYPE_INSTANT,
            Count: protos.TrackEvent.TYPE_COUNTER,
        }

    @property
    def count(self) -> int:
        return len(self._trace.packet)

    def take(self) -> bytes:
        data: bytes = self._trace.SerializeToString()
        self._trace = self._protos.Trace()
        return data

    def add(self, mark: Mark) -> None:
        uuid = self._uuid(mark.track)
        packet = self._packet(uuid)
        packet.timestamp = max(0, round(mark.t * 1e9))
        event = packet.track_event
        event.type, event.track_uuid = self._types[type(mark)], uuid
        if isinstance(mark, Count):
            event.double_counter_value = mark.value
            return
        if not isinstance(mark, End):
            event.name = mark.name
        if isinstance(mark, Begin):
            if mark.flow_out is not None:
                event.flow_ids.append(mark.flow_out)
            if mark.flow_in is not None:
                event.terminating_flow_ids.append(mark.flow_in)
        _annotate(event, mark.notes)

    def _packet(self, uuid: int) -> Any:
        packet = self._trace.packet.add()
        packet.trusted_packet_sequence_id = uuid
        return packet

    def _uuid(self, track: Track) -> int:
        """Return the number of a track, which is described when it first comes, behind its parent."""
        known = self._uuids.get(track)
        if known is not None:
            return known
        parent = None if track.parent is None else self._uuid(track.parent)
        uuid = self._uuids[track] = len(self._uuids) + 1
        descriptor = self._packet(uuid).track_descriptor
        descriptor.uuid, descriptor.name, descriptor.sibling_order_rank = uuid, track.name, track.order
        descriptor.child_ordering = self._protos.TrackDescriptor.EXPLICIT
        if parent is not None:
            descriptor.parent_uuid = parent
        if track.unit is not None:
            descriptor.counter.unit_name = track.unit
        return uuid


def _annotate(event: Any, notes: Notes) -> None:
    for name, value in notes:
        note = event.debug_annotations.add()
        note.name = name
        if isinstance(value, str):
            note.string_value = value
        elif isinstance(value, int):
            note.int_value = value
        else:
            note.double_value = value


def _protos() -> Any:
    return need("perfetto.protos.perfetto.trace.perfetto_trace_pb2", "perfetto", "A Perfetto trace")
