"""What of the batch work on a mesh may enter its next step while interactive requests are about.

Interactive work goes first, and what batch work costs it is bounded:

- a prompt: none begins beside it but in the padding of its own step, and at most one batch chunk is in flight on a
  mesh, so that it waits for no more;
- answers: batch rows and chunks take at most `SHARE` of the time that the answers' own steps take. Those steps earn
  an allowance for the mesh, in seconds; a step costs what it is expected to take longer for its batch work, set right
  when it has been measured. What the allowance does not cover waits; where a large chunk would, a smaller one may go.

Invariants: interactive requests are never held back; while some batch work is, a step is in flight that ends with
notice, or nothing but interactive work is left to do first. Where no interactive requests are about, nothing changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import bucket_for
from ..protocol.actions import Chunk, DecodeRow
from .mesh_state import MeshState, SharedState
from .request import Request
from .step_seconds import StepKind, StepSeconds

# Of the time of interactive answers' own steps, what batch work may add: TPOT is to stay within 1.2 times, and some of
# that goes to a mesh's neighbours.
SHARE = 0.15


class Allowed(NamedTuple):
    """What may enter a step."""

    prefilling: Sequence[Request]
    ready: Sequence[Request]
    tokens: int  # the most that its chunks may have


class Kinds(NamedTuple):
    """What a step is, and what it would be without its batch work."""

    whole: StepKind
    alone: StepKind

    @property
    def has_batch_chunk(self) -> bool:
        """Return whether it prefills batch prompts."""
        return self.whole.tokens > self.alone.tokens


@dataclass
class Account:
    """One mesh: what its steps take, those in flight, and the allowance of batch work."""

    seconds: StepSeconds = field(default_factory=StepSeconds)
    steps: dict[int, tuple[Kinds, float]] = field(default_factory=dict)  # -> kinds, and what it cost
    allowance: float = 0.0  # in seconds

    def extra(self, kinds: Kinds) -> float | None:
        """Return how much longer a step is expected to take for its batch work; None: nothing is known."""
        whole, alone = self.seconds.expect(kinds.whole), self.seconds.expect(kinds.alone)
        return None if whole is None or alone is None else max(0.0, whole - alone)

    def affords(self, kinds: Kinds) -> bool:
        """Return whether the allowance covers a step's batch work; what was never measured is tried, the answers alone
        first."""
        if self.seconds.expect(kinds.alone) is None:
            return False
        extra = self.extra(kinds)
        return self.allowance >= (0.0 if extra is None else extra)


class BatchAllowance:
    """The accounts of one engine's meshes."""

    def __init__(self, shared: SharedState):
        """Begin with nothing measured."""
        self._config, self._requests = shared.config, shared.requests
        self._accounts = [Account() for _ in shared.meshes]

    def allowed(self, mesh: MeshState, prefilling: Sequence[Request], ready: Sequence[Request]) -> Allowed:
        """Return what may enter the next step of a mesh that has batch work, while interactive requests are about."""
        account, tokens = self._accounts[mesh.index], self._config.chunk_size
        prompts = [request for request in prefilling if not request.is_batch]
        answers = [request for request in ready if not request.is_batch]
        if not answers:
            account.allowance = 0.0  # what was earned from answers that have ended is not to fall on the next
        if prompts:
            rows = self._rows(account, answers, ready) if answers else ()
            return Allowed([*prompts, *(r for r in prefilling if r.is_batch)], rows, self._own_bucket(prompts))
        if prefilling and any(kinds.has_batch_chunk for kinds, _ in account.steps.values()):
            prefilling = ()
        if answers:
            tokens = self._tokens(account, len(answers) if mesh.spec.fused else 0) if prefilling else 0
            return Allowed(prefilling if tokens else (), self._rows(account, answers, ready), tokens)
        return Allowed(prefilling, ready, tokens)

    def _own_bucket(self, prompts: Sequence[Request]) -> int:
        """Return the tokens of a step of these prompts' chunks, with its padding."""
        left = sum(max(1, request.to_prefill - request.prefilled) for request in prompts)
        return bucket_for(min(left, self._config.chunk_size), self._config.prefill_buckets)

    def _rows(self, account: Account, answers: list[Request], ready: Sequence[Request]) -> list[Request]:
        """Take the answers and as many batch rows, in order, as the allowance covers: bucket by bucket."""
        most, alone = len(answers), StepKind(0, self._decode(len(answers)))
        for bucket in self._config.decode_buckets:
            if bucket <= most:
                continue
            if most == len(ready) or not account.affords(Kinds(StepKind(0, bucket, is_mixed=True), alone)):
                break
            most = min(bucket, len(ready))
        return [*answers, *[request for request in ready if request.is_batch][: most - len(answers)]]

    def _tokens(self, account: Account, rows: int) -> int:
        """Return the tokens of the largest chunk that is covered, beside so many answers' rows; 0: of none."""
        rows = self._decode(rows)
        most = 0
        for size in self._config.prefill_buckets:
            kinds = Kinds(StepKind(size, rows, is_mixed=rows > 0), StepKind(0, rows))
            if not account.affords(kinds) or (most and account.extra(kinds) is None):
                break
            most = size
        return most

    # ---- what steps take

    def began(self, mesh: int, step: int, chunks: Sequence[Chunk], rows: Sequence[DecodeRow]) -> None:
        """Note that a step was dispatched."""
        account, kinds = self._accounts[mesh], self._kinds(chunks, rows)
        cost = account.extra(kinds) or 0.0
        account.allowance -= cost
        account.steps[step] = kinds, cost

    def _kinds(self, chunks: Sequence[Chunk], rows: Sequence[DecodeRow]) -> Kinds:
        requests = self._requests
        own_chunks = [chunk for chunk in chunks if not requests[chunk.request_id].is_batch]
        own_rows = sum(not requests[row.request_id].is_batch for row in rows)
        own = len(own_chunks) + own_rows
        alone = StepKind(self._prefill(own_chunks), self._decode(own_rows))
        is_mixed = 0 < own < len(chunks) + len(rows)
        return Kinds(StepKind(self._prefill(chunks), self._decode(len(rows)), is_mixed), alone)

    def _prefill(self, chunks: Sequence[Chunk]) -> int:
        return bucket_for(sum(chunk.length for chunk in chunks), self._config.prefill_buckets) if chunks else 0

    def _decode(self, rows: int) -> int:
        return bucket_for(rows, self._config.decode_buckets) if rows else 0

    def ended(self, mesh: int, step: int, seconds: float) -> None:
        """Take in how long a step took."""
        account = self._accounts[mesh]
        if step in account.steps:
            kinds, cost = account.steps.pop(step)
            account.seconds.add(kinds.whole, seconds)
            self._settle(account, kinds, seconds, cost)

    def _settle(self, account: Account, kinds: Kinds, seconds: float, cost: float) -> None:
        alone = account.seconds.expect(kinds.alone) or 0.0
        if kinds.whole != kinds.alone:
            account.allowance += cost - max(0.0, seconds - alone)
        if kinds.alone.rows:
            account.allowance += SHARE * alone
        # One small chunk, or one decode step, is kept at most: no answer is to meet what many others have earned.
        most = account.seconds.longest(self._config.prefill_buckets[0])
        account.allowance = min(most, max(-most, account.allowance))

    def forget(self, mesh: int) -> None:
        """Note that the steps in flight on a mesh are lost."""
        self._accounts[mesh].steps.clear()
