"""A device made of dicts: performs the scheduler's actions in order and checks what each page holds when it is read."""

from collections import deque

from twinmesh.engine.protocol import (
    AssignPages,
    Decode,
    DropTransfer,
    Finish,
    Outcome,
    Prefill,
    Scatter,
    StartTransfer,
    StepDone,
    TransferReady,
)


class FakeDevice:
    """`steps[mesh]`: dispatched steps whose results are not out. `transfers`: those on their way."""

    def __init__(self, scheduler, page_size):
        self.scheduler, self.page_size = scheduler, page_size
        meshes = range(len(scheduler.meshes))
        self.memory = [{} for _ in meshes]  # (page, offset) -> (request, position)
        self.tables = [{} for _ in meshes]  # slot -> pages
        self.steps = [deque() for _ in meshes]
        self.staged, self.transfers = {}, []
        self.finished = {}

    def perform(self, actions):
        for action in actions:
            getattr(self, f"_{type(action).__name__}")(action)

    def _AssignPages(self, action: AssignPages):
        self.tables[action.mesh][action.slot] = action.pages

    def _Prefill(self, action: Prefill):
        assert sum(chunk.length for chunk in action.chunks) <= action.bucket
        for chunk in action.chunks:
            pages = self.tables[action.mesh][chunk.slot]
            self._check(action.mesh, pages, chunk.request_id, chunk.start)
            for position in range(chunk.start, chunk.start + chunk.length):
                self._write(action.mesh, pages, chunk.request_id, position)
        self.steps[action.mesh].append(action)

    def _Decode(self, action: Decode):
        assert 0 < len(action.rows) <= action.bucket
        for row in action.rows:
            request = self.scheduler.owner(action.mesh, row)
            pages = self.tables[action.mesh][row.slot]
            self._check(action.mesh, pages, request.id, row.kv_len - 1)
            self._write(action.mesh, pages, request.id, row.kv_len - 1)
        self.steps[action.mesh].append(action)

    def _StartTransfer(self, action: StartTransfer):
        assert len(action.source_pages) <= action.bucket
        memory = self.memory[action.source]
        self.staged[action.transfer] = [
            {offset: memory.get((page, offset)) for offset in range(self.page_size)} for page in action.source_pages
        ]
        self.transfers.append(action.transfer)

    def _Scatter(self, action: Scatter):
        assert action.transfer not in self.transfers, "scattered before it was ready"
        for page, cells in zip(action.pages, self.staged.pop(action.transfer), strict=True):
            for offset, cell in cells.items():
                self.memory[action.destination][page, offset] = cell

    def _DropTransfer(self, action: DropTransfer):
        self.staged.pop(action.transfer)

    def _Finish(self, action: Finish):
        assert action.request_id not in self.finished, "finished twice"
        self.finished[action.request_id] = action.reason

    def _write(self, mesh, pages, request_id, position):
        page = pages[position // self.page_size]
        self.memory[mesh][page, position % self.page_size] = (request_id, position)

    def _check(self, mesh, pages, request_id, length):
        for position in range(length):
            cell = self.memory[mesh].get((pages[position // self.page_size], position % self.page_size))
            assert cell == (request_id, position), f"{request_id} reads {cell} at {position}"

    def complete_step(self, mesh, t, stops=lambda request: False):
        """The oldest step's result comes out."""
        action = self.steps[mesh].popleft()
        rows = [c for c in action.chunks if c.is_last] if isinstance(action, Prefill) else action.rows
        owners = [owner for row in rows if (owner := self.scheduler.owner(mesh, row)) is not None]
        outcomes = tuple(Outcome(owner.id, stops(owner)) for owner in owners)
        self.scheduler.on(StepDone(t, mesh, action.step, outcomes))

    def complete_transfer(self, index, t):
        """A transfer arrives."""
        self.scheduler.on(TransferReady(t, self.transfers.pop(index)))

    def lose(self, mesh):
        """The mesh's pool is gone; results of steps in flight never come."""
        self.memory[mesh].clear()
        self.steps[mesh].clear()

    @property
    def is_idle(self):
        return not any(self.steps) and not self.transfers

    def drain(self, t):
        """Run until nothing is left to do."""
        for _ in range(100_000):
            self.perform(self.scheduler.actions())
            busy = [mesh for mesh, steps in enumerate(self.steps) if steps]
            if busy:
                self.complete_step(busy[0], t)
            elif self.transfers:
                self.complete_transfer(0, t)
            else:
                return
        raise AssertionError("never comes to rest")
