"""What an executor reports back: tokens and scores of a step, the fate of a transfer, or why something failed."""

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from .actions import Chunk, DecodeRow
from .events import MeshJoined, TransferFailed, TransferReady
from .message import Message


class TokenScores[ArrayT](NamedTuple):
    """Log-probabilities of n tokens, or what else `logprobs_mode` names, and each token's rank, 1 for the most likely.

    `top_ids` and `top_logprobs` are of the K = `EngineConfig.max_logprobs` most likely tokens, in descending order.
    """

    logprob: ArrayT  # [n] float32
    rank: ArrayT  # [n] int32
    top_ids: ArrayT  # [n, K] int32
    top_logprobs: ArrayT  # [n, K] float32


HostScores = TokenScores[np.ndarray]


class StepResult(Message, frozen=True, eq=False):
    """What a step sampled, on the host."""

    t: float
    mesh: int
    step: int
    rows: tuple[Chunk | DecodeRow, ...]  # the action's, chunks before decode rows
    tokens: np.ndarray  # [k, rows] int32, k = `Decode.steps`, else 1; meaningless for a chunk that is not the last
    scores: HostScores | None = None  # of the tokens, with axes [k, rows] for [n]; None unless a row wants them
    # By row: of the prompt tokens that follow those of a chunk, for requests that want them and have generated nothing
    # yet. The prompt's first token has none.
    prompt_scores: dict[int, HostScores] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 2 or shape[1] != len(self.rows) or self.tokens.dtype != np.int32:
            raise ValueError(f"{len(self.rows)} rows and tokens of shape {shape}")

    def score_of(self, step: int, row: int) -> HostScores:
        """Return the scores, n = 1, of tokens[step, row], whose request must want them."""
        assert self.scores is not None
        one = (step, slice(row, row + 1))
        return TokenScores(*(values[one] for values in self.scores))


class StepFailed(Message, frozen=True):
    """A step raised after it was dispatched; the steps that follow it on its mesh will raise too."""

    t: float
    mesh: int
    step: int
    reason: str


class MeshLost(Message, frozen=True):
    """A message to or from this mesh could not be read, so what it has done since is unknown.

    Each costs the requests of the mesh one of their starts, also where several come of one incident. With `is_gone` it
    is the process of the mesh that is lost, which costs none (`scheduler/lifecycle.py`).
    """

    t: float
    mesh: int
    reason: str
    is_gone: bool = False


Completion = StepResult | StepFailed | TransferReady | TransferFailed | MeshLost | MeshJoined


class Link(NamedTuple):
    """What hand-offs have moved from one mesh to another since start-up."""

    transfers: int = 0  # that arrived
    bytes: int = 0  # of KV and request state
    seconds: float = 0.0  # from the dispatch of each to its arrival, added up

    def plus(self, size: int, seconds: float) -> "Link":
        """Return the same with one more transfer."""
        return Link(self.transfers + 1, self.bytes + size, self.seconds + seconds)


@dataclass
class Traffic:
    """What hand-offs have moved since start-up: as `Link`, in all and by source and destination."""

    transfers: int = 0
    bytes: int = 0
    seconds: float = 0.0
    links: dict[tuple[int, int], Link] = field(default_factory=dict)

    def count(self, source: int, destination: int, size: int, seconds: float) -> None:
        """Count a transfer that arrived."""
        self.transfers += 1
        self.bytes += size
        self.seconds += seconds
        link = source, destination
        self.links[link] = self.links.get(link, Link()).plus(size, seconds)


def describe(error: BaseException) -> str:
    """Describe an error in one line: its kind and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
