"""A device made of dicts: performs the scheduler's actions in order and checks what each page holds when it is read.

A token is its content: (prompt name, position) in a prompt, (request, position) when generated. Requests with the same
prompt name share contents, as they share block hashes.
"""

from collections import deque

from twinmesh.engine.protocol.actions import (
    AssignPages,
    CopyPage,
    Decode,
    DropTransfer,
    Finish,
    Fused,
    Prefill,
    RolesSettled,
    Scatter,
    StartTransfer,
)
from twinmesh.engine.protocol.events import Outcome, StepDone, TransferReady


class FakeDevice:
    """A device for every mesh of `scheduler`."""

    def __init__(self, scheduler, prompts):
        """Begin with empty pages; `prompts` maps a request to its prompt's name and length."""
        self.scheduler, self.prompts = scheduler, prompts
        self.windows, self.page_size = scheduler.config.windows, scheduler.config.page_size
        meshes, groups = range(len(scheduler.meshes)), range(len(self.windows))
        self.memory = [[{} for _ in groups] for _ in meshes]  # (page, offset) -> content
        self.assigned = [[{} for _ in groups] for _ in meshes]  # the host's tables: slot -> {index: page}
        self.tables = [[{} for _ in groups] for _ in meshes]  # the device's, which only steps and scatters change
        self.states = [{} for _ in meshes]  # slot -> (request, run)
        self.steps = [deque() for _ in meshes]  # dispatched, without their results
        self.staged, self.transfers = {}, []  # transfers: those on their way
        self.outputs = {}  # request -> tokens read
        self.finished = {}
        self.settled = {}  # calls for roles -> their answers
        self.computed, self.dispatched, self.most_copies = 0, 0, 0

    def content(self, name, position):
        prompt, length = self.prompts[name]
        return (prompt, position) if position < length else (name, position)

    def perform(self, actions):
        for action in actions:
            getattr(self, f"_{type(action).__name__}")(action)

    def _AssignPages(self, action: AssignPages):
        table = self.assigned[action.mesh][action.group].setdefault(action.slot, {})
        table.update(enumerate(action.pages, action.first))

    def _copy_tables(self, mesh, slot):
        for assigned, table in zip(self.assigned[mesh], self.tables[mesh], strict=True):
            table[slot] = dict(assigned[slot])

    def _CopyPage(self, action: CopyPage):
        memory = self.memory[action.mesh][action.group]
        for offset in range(self.page_size):
            memory[action.destination, offset] = memory.get((action.source, offset))
        self.most_copies += 1

    def _Prefill(self, action: Prefill):
        assert 0 < sum(chunk.length for chunk in action.chunks) <= action.bucket
        for chunk in action.chunks:
            self.computed += chunk.length
            self._copy_tables(action.mesh, chunk.slot)
            for position in range(chunk.start, chunk.kv_len):
                if position >= chunk.write_from:
                    self._write(action.mesh, chunk.slot, chunk.request_id, position)
            self._read(action.mesh, chunk.slot, chunk.request_id, chunk.start, chunk.kv_len)
            if chunk.is_last:
                self.states[action.mesh][chunk.slot] = (chunk.request_id, chunk.run)
        self._dispatch(action)

    def _Decode(self, action: Decode):
        assert 0 < len(action.rows) <= action.bucket
        self._decode_rows(action.mesh, action.rows, action.steps)
        self._dispatch(action)

    def _Fused(self, action: Fused):
        self._decode_rows(action.mesh, action.rows, 1)
        self._Prefill(action)

    def _decode_rows(self, mesh, rows, steps):
        for row in rows:
            assert self.states[mesh][row.slot] == (row.request_id, row.run), "decodes from another's state"
            for position in range(row.kv_len - 1, row.kv_len - 1 + steps):
                index = position // self.page_size
                for assigned, table in zip(self.assigned[mesh], self.tables[mesh], strict=True):
                    table[row.slot][index] = assigned[row.slot][index]
                self._write(mesh, row.slot, row.request_id, position)
                self._read(mesh, row.slot, row.request_id, position, position + 1)

    def _dispatch(self, action):
        self.dispatched += 1
        self.steps[action.mesh].append(action)

    def _StartTransfer(self, action: StartTransfer):
        assert max(map(len, action.source_pages)) <= action.bucket
        memory, offsets = self.memory[action.source], range(self.page_size)
        pages = [
            [[memory[group].get((page, offset)) for offset in offsets] for page in ids]
            for group, ids in enumerate(action.source_pages)
        ]
        state = None if action.source_slot is None else self.states[action.source][action.source_slot]
        self.staged[action.transfer] = pages, state
        self.transfers.append(action.transfer)

    def _Scatter(self, action: Scatter):
        assert action.transfer not in self.transfers, "scattered before it was ready"
        pages, state = self.staged.pop(action.transfer)
        for group, (ids, cells) in enumerate(zip(action.pages, pages, strict=True)):
            for page, contents in zip(ids, cells, strict=True):
                for offset, cell in enumerate(contents):
                    self.memory[action.destination][group][page, offset] = cell
        assert (action.slot is None) == (state is None)
        if state is not None:
            self.states[action.destination][action.slot] = state
            self._copy_tables(action.destination, action.slot)

    def _DropTransfer(self, action: DropTransfer):
        self.staged.pop(action.transfer)

    def _Finish(self, action: Finish):
        assert action.request_id not in self.finished, "finished twice"
        self.finished[action.request_id] = action.reason

    def _RolesSettled(self, action: RolesSettled):
        assert action.call not in self.settled, "answered twice"
        self.settled[action.call] = action

    def _write(self, mesh, slot, name, position):
        for group in range(len(self.windows)):
            page = self.tables[mesh][group][slot][position // self.page_size]
            self.memory[mesh][group][page, position % self.page_size] = self.content(name, position)

    def _read(self, mesh, slot, name, start, end):
        """Check that the tokens from `start` to `end` see, in every group, what their windows hold."""
        for group, window in enumerate(self.windows):
            table, memory = self.tables[mesh][group][slot], self.memory[mesh][group]
            for seen in range(0 if window is None else max(0, start - window + 1), end):
                cell = memory.get((table[seen // self.page_size], seen % self.page_size))
                assert cell == self.content(name, seen), f"{name} from {start} to {end} reads {cell} at {seen}"

    def complete_step(self, mesh, t, stops=lambda request: False):
        """Pass the oldest step's result to the scheduler."""
        action = self.steps[mesh].popleft()
        rows = [chunk for chunk in getattr(action, "chunks", ()) if chunk.is_last] + list(getattr(action, "rows", ()))
        outcomes = []
        for row in rows:
            for step in range(getattr(action, "steps", 1)):
                request = self.scheduler.owner(row)
                if request is None:
                    break
                known = self.outputs.setdefault(request.id, [])
                number = row.kv_len + step - self.prompts[request.id][1]  # of this output, from 0
                if number < len(known):
                    continue
                assert number == len(known), f"{request.id}: output {number} after {len(known)}"
                known.append(number)
                stopped = stops(request)
                length = row.kv_len + step + 1
                full = length % self.page_size == 0 and len(request.hashes) == length // self.page_size - 1
                block_hash = f"{request.id}:{length}".encode() if full else None
                outcomes.append(Outcome(request.id, stopped, block_hash))
                if stopped:
                    break
        self.scheduler.on(StepDone(t, mesh, action.step, tuple(outcomes)))

    def complete_transfer(self, index, t):
        """Let a transfer arrive."""
        self.scheduler.on(TransferReady(t, self.transfers.pop(index)))

    def lose(self, mesh):
        """Lose the mesh's pool, and the results of its steps in flight."""
        for memory in self.memory[mesh]:
            memory.clear()
        self.states[mesh].clear()
        self.steps[mesh].clear()

    def drain(self, t):
        """Run until nothing is left to do."""
        for _ in range(100_000):
            self.perform(self.scheduler.actions())
            busy = [mesh for mesh, steps in enumerate(self.steps) if steps]
            if self.transfers:
                self.complete_transfer(0, t)
            elif busy:
                self.complete_step(busy[0], t)
            else:
                return
        raise AssertionError("never comes to rest")


def block_hashes(prompt, length, page_size):
    """Hash full pages as `engine/paging/block_hash.py` does, for contents that are names: one hash per page."""
    return tuple(f"{prompt}:{end}".encode() for end in range(page_size, length + 1, page_size))
