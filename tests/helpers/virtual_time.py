"""A fake device in virtual time: steps and transfers take as long as a test says, and arrivals come when it says.

Nothing sleeps: time jumps from event to event. Deadlines are due on time, by `Tick`, as in the core.
"""

import heapq
from itertools import count

from twinmesh.engine.protocol.events import Tick


class VirtualTime:
    """Time of a scheduler and its fake device."""

    def __init__(self, scheduler, device, seconds):
        """`seconds(action)`: how long a step takes; transfers take no time."""
        self.scheduler, self.device, self._seconds = scheduler, device, seconds
        self.now, self._events, self._numbers = 0.0, [], count()
        self._running = set()  # meshes whose oldest step is on the way to its end

    def at(self, t, call):
        """Let `call()` happen at a time."""
        heapq.heappush(self._events, (t, next(self._numbers), call))

    def run(self, until, after=lambda: None):
        """Let time pass until then, or until nothing happens any more; `after()` is called after every decision."""
        while True:
            self._decide(after)
            due = self.scheduler.next_due()
            t = min(self._events[0][0] if self._events else until, until if due is None else due)
            if t >= until:
                self.now = until if self._events else self.now
                return
            self.now = max(self.now, t)
            if self._events and self._events[0][0] <= t:
                heapq.heappop(self._events)[2]()
            else:
                self.scheduler.on(Tick(self.now))

    def _decide(self, after):
        self.device.perform(self.scheduler.actions())
        after()
        while self.device.transfers:
            self.device.complete_transfer(0, self.now)
            self.device.perform(self.scheduler.actions())
            after()
        for mesh, steps in enumerate(self.device.steps):
            if steps and mesh not in self._running:
                self._running.add(mesh)
                self.at(self.now + self._seconds(steps[0]), lambda mesh=mesh: self._end_step(mesh))

    def _end_step(self, mesh):
        self._running.remove(mesh)
        self.device.complete_step(mesh, self.now)
