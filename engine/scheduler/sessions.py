"""What the scheduler remembers of conversations: of each its latest request that has ended, for the next one.

Bounded: of the conversations used least recently those are forgotten that are too many, or whose blocks are. Nothing
that is decided here takes longer with more of them. It holds no pages: what it remembers says where KV was left, and
the caches say whether it is still there.
"""

from collections import OrderedDict
from dataclasses import dataclass

from ..paging.lost_blocks import LostBlocks
from .request import Request, State

# A session whose blocks were evicted long ago is the one that is worth explaining, so this is more than caches hold:
# 17 million tokens in pages of 64, at most 15 MB of hashes.
MOST_BLOCKS = 2**18
MOST_SESSIONS = 2**14


@dataclass(frozen=True, slots=True)
class Session:
    """What the latest request of a conversation left behind. Not to be changed, its list neither."""

    hashes: list[bytes]  # of the full pages of its prompt and answer
    blocks: int  # how many of them were computed
    reusable: int  # how many of them the prefix cache may keep: the rest are an answer in deterministic mode
    meshes: tuple[int, ...]  # where its KV was left: the mesh where it ended, and the one that computed its prompt
    times_voided: int  # how often weights had changed by then


class Sessions:
    """The conversations of one engine."""

    def __init__(self, lost: LostBlocks, *, most_sessions: int = MOST_SESSIONS, most_blocks: int = MOST_BLOCKS):
        """Begin without any; `lost` knows how often weights have changed."""
        self._lost = lost
        self._most_sessions, self._most_blocks = most_sessions, most_blocks
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the one used least recently first
        self.blocks = 0  # of all of them

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, request: Request) -> Session | None:
        """Find what the conversation that a request goes on with has left behind; None: there is none, or nothing."""
        name = request.facts.service.session
        session = None if name is None else self._sessions.get(name)
        if session is not None and name is not None:
            self._sessions.move_to_end(name)
        return session

    def end(self, request: Request, page_size: int) -> None:
        """Take in that a request ends now, which is still where it was. One that waits leaves nothing.

        One that neither reads nor feeds the cache leaves nothing, and what its conversation left before stays.
        """
        name = request.facts.service.session
        if name is None or request.state is State.WAITING:
            return
        if not request.hashes and request.prompt_len >= page_size:
            return
        known = min(request.kv_len, request.prompt_len + request.confirmed) // page_size
        there = () if request.placement is None else (request.placement.mesh,)
        hashes = [*request.hashes, *request.unshared] if request.unshared else request.hashes
        request.is_remembered = True
        self._put(
            name,
            Session(
                hashes,
                blocks=min(len(hashes), known),
                reusable=len(request.hashes),
                meshes=(*there, request.prefilled_on),
                times_voided=self._lost.times_voided,
            ),
        )

    def _put(self, name: str, session: Session) -> None:
        self._drop(name)
        self._sessions[name] = session
        self.blocks += len(session.hashes)
        while len(self._sessions) > self._most_sessions or self.blocks > self._most_blocks:
            self._drop(next(iter(self._sessions)))

    def _drop(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            self.blocks -= len(session.hashes)

    def check(self) -> None:
        """Raise unless blocks are counted right and within bounds."""
        blocks = sum(len(session.hashes) for session in self._sessions.values())
        if blocks != self.blocks or blocks > self._most_blocks or len(self) > self._most_sessions:
            raise RuntimeError(f"{len(self)} sessions with {blocks} blocks, counted {self.blocks}")
