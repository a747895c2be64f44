"""What each mesh did: its steps, what it sent and took in, its role, and how full its KV pools were.

A step lies where its stamps say that its devices were at it. A transfer is a slice on its source, from when it was sent
until it arrived, and one on its destination, from there until it was scattered or dropped, with a flow from one to the
other. What was never read or never arrived is not drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...protocol.actions import Action, Decode, DropTransfer, Fused, Prefill, Scatter, StartTransfer
from ...protocol.events import MeshFailed, MeshJoined, TransferFailed
from ...protocol.stamps import StepStamps, TransferStamps
from ...scheduler.scheduler import Scheduler
from .timeline_tracks import Begin, Count, End, Instant, Lane, Lanes, Mark, Notes, Track

_MOST_NAMED = 16  # requests, in a step's notes


@dataclass(slots=True, eq=False)
class _Transfer:
    """A transfer that was not scattered yet."""

    action: StartTransfer
    request: str
    sending: Lane
    receiving: Lane | None = None  # once it has arrived
    arrived: float = 0.0
    is_dropped: bool = False


class _Mesh:
    """The tracks of one mesh, and the steps on it that were not read."""

    def __init__(self, name: str, order: int) -> None:
        group = Track(name, None, order)
        self.group, self.steps = group, Track("steps", group, 1)
        self.sends, self.receives = Lanes("sends", group, 2), Lanes("receives", group, 3)
        self.kv = Track("KV pages in use", group, 4, "%")
        self.used = -1.0
        self.done = 0.0  # when the last step on the track ended
        self.in_flight: dict[int, Prefill | Decode | Fused] = {}


class MeshTimeline:
    """The meshes of one run."""

    def __init__(self, scheduler: Scheduler, emit: Callable[[Mark], None], first: int) -> None:
        """Begin with nothing on the tracks, which come in order from `first` on; `emit` takes the marks."""
        self._scheduler, self._emit = scheduler, emit
        is_pool = scheduler.config.topology.is_pool
        self._meshes = [
            _Mesh(f"mesh {mesh.index}" + ("" if is_pool else f": {mesh.role}"), first + mesh.index)
            for mesh in scheduler.meshes
        ]
        self._transfers: dict[int, _Transfer] = {}

    def group(self, mesh: int) -> Track:
        """Return the track that those of a mesh stand under; the first place there is free."""
        return self._meshes[mesh].group

    def decided(self, actions: Sequence[Action], now: float) -> None:
        """Take in what was decided."""
        for action in actions:
            match action:
                case Prefill() | Decode() | Fused():
                    self._meshes[action.mesh].in_flight[action.step] = action
                case StartTransfer(transfer=number, source=source):
                    id_ = self._scheduler.request_of(number)
                    request = "a request that has ended" if id_ is None else f"request {id_}"
                    self._transfers[number] = _Transfer(action, request, self._meshes[source].sends.take(now))
                case Scatter(transfer=number):
                    self._received(number, now, "scattered")
                case DropTransfer(transfer=number):
                    self._dropped(number, now)
        for mesh, state in zip(self._meshes, self._scheduler.meshes, strict=True):
            used = 100.0 * (1.0 - state.pages.room)
            if used != mesh.used:
                mesh.used = used
                self._emit(Count(mesh.kv, now, used))

    def happened(self, event: object, now: float) -> None:
        """Take in failures."""
        if isinstance(event, MeshFailed):
            mesh = self._meshes[event.mesh]
            mesh.in_flight.clear()
            mesh.done = max(mesh.done, now)
            what = "mesh gone" if event.is_gone else "mesh failed"
            self._emit(Instant(mesh.steps, mesh.done, what, (("reason", event.reason),)))
        elif isinstance(event, MeshJoined):
            self._emit(Instant(self._meshes[event.mesh].steps, now, "mesh joined", ()))
        elif isinstance(event, TransferFailed) and (transfer := self._transfers.pop(event.transfer, None)) is not None:
            lane = transfer.sending
            t = max(lane.end, now)
            notes = (("request", transfer.request), ("reason", event.reason))
            self._emit(Instant(lane.track, t, "transfer failed", notes))
            self._meshes[transfer.action.source].sends.give_back(lane, t)

    def stamped(self, stamps: object) -> None:
        """Draw a step that was read, and a transfer that arrived."""
        if isinstance(stamps, StepStamps):
            self._step(stamps)
        elif isinstance(stamps, TransferStamps):
            self._arrived(stamps)

    def end(self, now: float) -> None:
        """End what is open when the log ends."""
        for number, transfer in list(self._transfers.items()):
            if transfer.receiving is not None:
                self._received(number, now, "the log ends")

    def _step(self, stamps: StepStamps) -> None:
        mesh = self._meshes[stamps.mesh]
        action = mesh.in_flight.pop(stamps.step, None)
        if action is None:  # its mesh was lost meanwhile
            return
        begun = max(mesh.done, stamps.begun)
        mesh.done = max(begun, stamps.done)
        self._emit(Begin(mesh.steps, begun, _name(action), _notes(action, stamps)))
        self._emit(End(mesh.steps, mesh.done))

    def _arrived(self, stamps: TransferStamps) -> None:
        transfer = self._transfers.get(stamps.transfer)
        if transfer is None:
            return
        source, lane = stamps.source, transfer.sending
        sent = max(lane.end, stamps.sent)
        transfer.arrived = max(sent, stamps.arrived)
        notes = (
            ("transfer", stamps.transfer), ("bytes", stamps.size), ("pages", transfer.action.bucket),
            ("waited for a step, ms", round(1e3 * (stamps.begun - stamps.sent), 3)),
            ("with state", "no" if transfer.action.source_slot is None else "yes"),
        )  # fmt: skip
        name = f"{transfer.request} to mesh {stamps.destination}"
        self._emit(Begin(lane.track, sent, name, notes, flow_out=_flow(stamps.transfer)))
        self._emit(End(lane.track, transfer.arrived))
        self._meshes[source].sends.give_back(lane, transfer.arrived)
        transfer.receiving = self._meshes[stamps.destination].receives.take(transfer.arrived)
        if transfer.is_dropped:
            self._received(stamps.transfer, transfer.arrived, "dropped")

    def _dropped(self, number: int, now: float) -> None:
        transfer = self._transfers.get(number)
        if transfer is not None and transfer.receiving is None:
            transfer.is_dropped = True
        else:
            self._received(number, now, "dropped")

    def _received(self, number: int, now: float, how: str) -> None:
        transfer = self._transfers.pop(number, None)
        if transfer is None or transfer.receiving is None:  # it was stamped by nobody
            return
        lane, action = transfer.receiving, transfer.action
        end = max(transfer.arrived, now)
        name = f"{transfer.request} from mesh {action.source}"
        notes = (("transfer", number), ("then", how))
        self._emit(Begin(lane.track, transfer.arrived, name, notes, flow_in=_flow(number)))
        self._emit(End(lane.track, end))
        self._meshes[action.destination].receives.give_back(lane, end)


def _flow(transfer: int) -> int:
    """Return the number of a transfer's flow: above 0."""
    return transfer + 1


def _name(action: Prefill | Decode | Fused) -> str:
    if isinstance(action, Decode):
        return "decode"
    return "prefill" if isinstance(action, Prefill) else "fused"


def _notes(action: Prefill | Decode | Fused, stamps: StepStamps) -> Notes:
    chunks = () if isinstance(action, Decode) else action.chunks
    rows = () if isinstance(action, Prefill) else action.rows
    named = ", ".join([str(chunk.request_id) for chunk in chunks[:_MOST_NAMED]])
    prompts = (("prompts", named + (", ..." if len(chunks) > _MOST_NAMED else "")),) if chunks else ()
    return (
        ("step", action.step), ("bucket", action.bucket), ("chunks", len(chunks)),
        ("prompt tokens", sum([chunk.length for chunk in chunks])), *prompts, ("rows", len(rows)),
        ("decode steps", action.steps if isinstance(action, Decode) else min(1, len(rows))),
        ("dispatched before it began, ms", round(1e3 * (stamps.begun - stamps.dispatched), 3)),
        ("read after it was done, ms", round(1e3 * (stamps.read - stamps.done), 3)),
    )  # fmt: skip
