"""What steps, transfers and the host's own work cost, in seconds, as a formula with given coefficients.

One model stands for one mesh of one engine: a model's weights, a tp, a kind of device, and the engine's buckets. Its
coefficients come from a profile that was measured there, from a run's own log, or from published peaks of the device
(`simulation/costs/profile.py`). The simulator takes these times for true, the planner predicts with them, and `cost.py`
begins with them until it has measured.

A step runs one compiled program, padded to its bucket, which costs the same whatever fills it; only attention depends
on what is in it. So a step that runs alone takes

    fixed of its program + chunk x chunks + pair x pairs + row x rows + context x KV tokens read by its rows,

where a pair is a query token of a prompt chunk and a key token that it attends to. While other meshes compute it gets
on more slowly, where they share cores and memory with it, as meshes of CPU devices do: `ProgramCost.slowdown`. All is a
pure function; no JAX.
"""

from collections.abc import Sequence

import msgspec

from ..protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill


class ProgramCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a compiled program of one kind and bucket costs, in seconds; what has no term is in `fixed`."""

    fixed: float  # of the program, its padding included
    chunk: float = 0.0  # of each prompt chunk
    pair: float = 0.0  # of each query token and key token of a prompt chunk, all layers together
    row: float = 0.0  # of each row that decodes
    context: float = 0.0  # of each KV token that a decoding row reads, all layers together
    # By how much longer it takes, as a share, for each other mesh that computes meanwhile: a step with prompt chunks,
    # or one of decode rows alone. 0 where devices share nothing.
    beside_prefill: float = 0.0
    beside_decode: float = 0.0

    def slowdown(self, prefills: int, decodes: int) -> float:
        """Return how many seconds a second's work takes while so many other meshes compute."""
        return 1.0 + self.beside_prefill * prefills + self.beside_decode * decodes


class LinkCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a transfer between two meshes costs, in seconds."""

    fixed: float  # of each transfer
    byte: float  # of each byte, while no other transfer is on the link
    is_shared: bool = True  # whether transfers that are under way at once share the bytes per second
    # For how long, for each byte, the source computes no step since it gathers, and the destination since it scatters.
    # Gathering is part of the transfer's own time.
    gather: float = 0.0
    scatter: float = 0.0


class HostCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the dispatching thread and the threads around it take, in seconds, before devices have anything to do."""

    arrival: float = 0.0  # from the call to the event: the prompt is tokenised and hashed
    token: float = 0.0  # of that, more for each prompt token
    step: float = 0.0  # to decide on and dispatch a step
    row: float = 0.0  # more for each of its rows and chunks
    read: float = 0.0  # from the end of a step until its tokens are taken in
    # That a step takes longer on a mesh that had nothing to do when it was dispatched: threads sleep, caches are cold.
    idle: float = 0.0


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The costs of one mesh of an engine, and of its links."""

    prefill: dict[int, ProgramCost]  # by bucket: tokens that a step is padded to
    decode: dict[int, ProgramCost]  # by bucket: rows that a step is padded to
    fused: dict[int, ProgramCost]  # by bucket of tokens; its rows are padded to the largest decode bucket
    link: LinkCost
    host: HostCost = HostCost()

    def step(self, action: Prefill | Decode | Fused) -> float:
        """Return the seconds that a dispatched step takes on its device alone, all its passes together."""
        if isinstance(action, Decode):
            return self.decode_steps(action.bucket, action.rows, action.steps)
        if isinstance(action, Prefill):
            return self.prefill_step(action.bucket, action.chunks)
        program = self.fused[action.bucket]
        return _chunks(program, action.chunks) + _rows(program, action.rows) + program.fixed

    def program(self, action: Prefill | Decode | Fused) -> ProgramCost:
        """Return the costs of the program that a step runs."""
        if isinstance(action, Decode):
            return self.decode[action.bucket]
        return (self.prefill if isinstance(action, Prefill) else self.fused)[action.bucket]

    def prefill_step(self, bucket: int, chunks: Sequence[Chunk]) -> float:
        """Return the seconds of a prefill step."""
        program = self.prefill[bucket]
        return program.fixed + _chunks(program, chunks)

    def decode_steps(self, bucket: int, rows: Sequence[DecodeRow], steps: int = 1) -> float:
        """Return the seconds of so many decode steps, of which `rows` describes the first."""
        program = self.decode[bucket]
        first = program.fixed + _rows(program, rows)
        grown = program.context * len(rows) * (steps * (steps - 1) // 2)  # each step reads one token more of each row
        return steps * first + grown

    def transfer(self, size: int) -> float:
        """Return the seconds to move `size` bytes in one transfer over a link that has no other."""
        return self.link.fixed + self.link.byte * size


def pairs(start: int, length: int) -> int:
    """Count the pairs of query and key token of a prompt chunk: each token attends to itself and all before it."""
    return length * start + length * (length + 1) // 2


def _chunks(program: ProgramCost, chunks: Sequence[Chunk]) -> float:
    return sum([program.chunk + program.pair * pairs(chunk.start, chunk.length) for chunk in chunks])


def _rows(program: ProgramCost, rows: Sequence[DecodeRow]) -> float:
    return program.row * len(rows) + program.context * sum([row.kv_len for row in rows])
