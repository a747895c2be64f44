"""An observer that measures a running engine: steps, transfers, and what the host adds to them.

It sees what the decision log sees, and when. A step counts from its dispatch, or from the end of the one before it on
its mesh if that is later, to its end as the executor saw it; a transfer from its turn on its source to its arrival, if
no other was on the same link meanwhile. All times are of the engine's clock. It runs on the dispatching thread.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from ...config import EngineConfig, PoolSize
from ...core.inspection import Observer
from ...core.submission import Submission
from ...protocol.actions import Action, Decode, Fused, Prefill, Scatter, StartTransfer
from ...protocol.events import TransferFailed, TransferReady
from ...protocol.results import StepFailed, StepResult
from ...scheduler.scheduler import Scheduler
from .measured import Entered, MeasuredTransfer
from .overlaps import Ran


class _Sending:
    """A transfer under way."""

    __slots__ = ("begin", "is_alone", "size")

    def __init__(self, size: int, begin: float | None) -> None:
        self.size, self.begin, self.is_alone = size, begin, True  # begin None: a step before it runs


class StepWatch(Observer):
    """What an engine did since this began to observe it."""

    def __init__(self, config: EngineConfig, pools: Sequence[PoolSize], clock: Callable[[], float]) -> None:
        """Begin with nothing."""
        self._config, self._pools, self._clock = config, pools, clock
        self._caps = [config.pages_to_send(window) for window in config.windows]
        self._dispatched: dict[tuple[int, int], tuple[float, Prefill | Decode | Fused, int, int]] = {}
        self._last: dict[int, int] = {}  # by mesh, the step that was dispatched last
        self._ended: dict[int, float] = {}  # by mesh, when the last step ended
        self._behind: dict[tuple[int, int], list[_Sending]] = {}  # transfers that begin when a step is done
        self._sending: dict[tuple[int, int], dict[int, _Sending]] = {}  # by link and number
        self._links: dict[int, tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}  # by transfer, until it is scattered
        self._gathered: Counter[int] = Counter()  # by mesh, bytes since its last step was dispatched
        self._scattered: Counter[int] = Counter()
        self.ran: list[Ran] = []
        self.transfers: list[MeasuredTransfer] = []
        self.entered: list[Entered] = []
        self.lags: list[float] = []  # from the ends of steps until their tokens were taken in

    def received(self, message: object) -> None:
        """Take in what has come."""
        match message:
            case StepResult(mesh=mesh, step=step, t=t):
                self.lags.append(self._clock() - t)
                self._end_step(mesh, step, t)
            case StepFailed(mesh=mesh, step=step):
                self._dispatched.pop((mesh, step), None)
            case TransferReady(transfer=number, t=t):
                self._end_transfer(number, t)
            case TransferFailed(transfer=number):
                self._end_transfer(number, None)
            case tuple():
                now = self._clock()
                self.entered += [
                    Entered(one.facts.prompt_len, now - one.arrival) for one in message if isinstance(one, Submission)
                ]

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """Take in what is dispatched now."""
        now = self._clock()
        for action in actions:
            if isinstance(action, Prefill | Decode | Fused):
                moved = self._gathered.pop(action.mesh, 0), self._scattered.pop(action.mesh, 0)
                self._dispatched[action.mesh, action.step] = now, action, *moved
                self._last[action.mesh] = action.step
            elif isinstance(action, StartTransfer):
                self._begin_transfer(action, now)
            elif isinstance(action, Scatter):
                self._scattered[action.destination] += self._sizes.pop(action.transfer, 0)

    def _end_step(self, mesh: int, step: int, t: float) -> None:
        dispatched = self._dispatched.pop((mesh, step), None)
        if dispatched is None:  # before this began
            return
        begin, action, gathered, scattered = dispatched
        before = self._ended.get(mesh)
        is_queued = before is not None and before > begin
        self.ran.append(Ran(action, max(begin, before or begin), t, is_queued, gathered, scattered))
        self._ended[mesh] = t
        for sending in self._behind.pop((mesh, step), ()):
            sending.begin = t

    def _begin_transfer(self, action: StartTransfer, now: float) -> None:
        before = action.source, self._last.get(action.source, -1)
        size = self._pools[action.source].transfer_bytes(action.bucket, self._caps)
        sending = _Sending(size, None if before in self._dispatched else now)
        self._gathered[action.source] += size
        self._sizes[action.transfer] = size
        if sending.begin is None:
            self._behind.setdefault(before, []).append(sending)
        link = action.source, action.destination
        on_link = self._sending.setdefault(link, {})
        for other in on_link.values():
            other.is_alone = sending.is_alone = False
        on_link[action.transfer] = sending
        self._links[action.transfer] = link

    def _end_transfer(self, number: int, t: float | None) -> None:
        link = self._links.pop(number, None)
        if link is None:
            return
        sending = self._sending[link].pop(number)
        if t is not None and sending.begin is not None and sending.is_alone and t > sending.begin:
            self.transfers.append(MeasuredTransfer(sending.size, t - sending.begin))
