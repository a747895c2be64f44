"""Why tokens of a prompt were not cached when it was placed: the report that its caller gets.

Blocks that are missed come in at most four runs, in this order: those that are cached, elsewhere or without the pages
of a window; those that are known to have been lost; those that the session's earlier request had, which are not known
to have been lost; and those that nobody is known to have had. A hash stands for all blocks before it, so a run ends
where a first block is not of it, found by doubling and bisection: a prompt that nobody has seen costs three look-ups,
however long it is. The reason of a run is that of its first block. It decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from ..paging.prefix_index import members
from ..protocol.cache_report import Miss, MissReason, PrefixCacheReport
from .mesh_state import SharedState
from .request import Request
from .sessions import Session

_NO_CACHE = "prefix_cache=False"
_NO_HASHES = "prompt_logprobs computes every token of its prompt"
_ANSWER = "deterministic=True computes an answer's tokens again"


class CacheReports:
    """The reports of one engine."""

    def __init__(self, shared: SharedState):
        """Look for reasons in what all meshes share."""
        self._has_cache, self._size = shared.config.prefix_cache, shared.config.page_size
        self._index, self._sessions = shared.index, shared.sessions

    def report(self, request: Request, mesh: int) -> PrefixCacheReport:
        """Say what was cached, and why the rest was not, of a prompt that begins to be computed on this mesh."""
        length, size = request.prompt_len, self._size
        blocks, first = len(request.hashes), request.prefilled // size
        if not request.prefilled and not blocks and (not self._has_cache or length >= size):
            because = _NO_HASHES if self._has_cache else _NO_CACHE
            return PrefixCacheReport(0, (Miss(MissReason.NOT_REUSABLE, length, because=because),))
        cached = length - request.unanswered
        if first >= blocks:
            return PrefixCacheReport(cached, (Miss(MissReason.LAST_PAGE, request.unanswered),))
        missed = list(self._of_blocks(request, mesh, first))
        if tail := length - blocks * size:
            missed.append(Miss(MissReason.LAST_PAGE, tail))
        return PrefixCacheReport(cached, tuple(missed))

    def _of_blocks(self, request: Request, mesh: int, first: int) -> Iterator[Miss]:
        """Yield why the blocks from the `first` on were not found on the mesh."""
        hashes, size, session = request.hashes, self._size, self._sessions.of(request)
        stop = len(hashes)
        listed = self._end_of_listed(hashes, first)
        if first < listed:
            yield self._of_listed(hashes[listed - 1], mesh, (listed - first) * size)
        lost = self._end_of_lost(hashes, listed)
        if listed < lost:
            loss = self._index.lost.find(hashes[listed])
            assert loss is not None
            yield Miss(loss.reason, (lost - listed) * size, at=loss.at)
        alike = 0 if session is None else common(session.hashes, hashes, session.blocks)
        if session is not None and lost < alike:
            yield from self._of_session(session, lost, alike)
        seen = max(lost, alike)
        if seen == stop:
            return
        if session is not None and alike < session.blocks:
            yield Miss(MissReason.DIFFERS, (stop - seen) * size, block=alike, earlier_blocks=session.blocks)
        else:
            yield Miss(MissReason.NEVER_SEEN, (stop - seen) * size)

    def _end_of_listed(self, hashes: Sequence[bytes], start: int) -> int:
        meshes = self._index.meshes
        if not meshes(hashes[start]):  # as most often
            return start
        return end_of_run(start + 1, len(hashes), lambda i: meshes(hashes[i]) != 0)

    def _end_of_lost(self, hashes: Sequence[bytes], start: int) -> int:
        find = self._index.lost.find
        if start == len(hashes) or find(hashes[start]) is None:  # as most often
            return start
        return end_of_run(start + 1, len(hashes), lambda i: find(hashes[i]) is not None)

    def _of_listed(self, block: bytes, mesh: int, tokens: int) -> Miss:
        """Say why a run of cached blocks, whose last is given, is not a hit on the mesh."""
        others = self._index.meshes(block) & ~(1 << mesh)
        if others:
            return Miss(MissReason.OTHER_MESH, tokens, mesh=next(members(others)))
        return Miss(MissReason.EVICTED, tokens)  # the pages of a window, which nobody notes

    def _of_session(self, session: Session, start: int, stop: int) -> Iterator[Miss]:
        """Yield why blocks that the session's earlier request had are gone, longer ago than losses are known."""
        kept, lost = max(start, min(stop, session.reusable)), self._index.lost
        if start < kept:
            voided = lost.voided if session.times_voided < lost.times_voided else None
            reason, at = (MissReason.EVICTED, None) if voided is None else voided
            yield Miss(reason, (kept - start) * self._size, at=at)
        if kept < stop:
            yield Miss(MissReason.NOT_REUSABLE, (stop - kept) * self._size, because=_ANSWER)


def common(blocks: Sequence[bytes], others: Sequence[bytes], most: int) -> int:
    """Count the first blocks, at most so many, that two sequences have in common."""
    return end_of_run(0, min(len(blocks), len(others), most), lambda i: blocks[i] == others[i])


def end_of_run(start: int, stop: int, holds: Callable[[int], bool]) -> int:
    """Find the first number from `start` on of which this does not hold, `stop` at most, where it holds of none after.

    By doubling and then bisection, so that one that is near is found at once.
    """
    step = 1
    while start < stop and holds(min(start + step, stop) - 1):
        start, step = min(start + step, stop), 2 * step
    end = min(start + step, stop)  # of the one before it this does not hold, unless all are passed
    while start < end - 1:
        middle = (start + end) // 2
        if holds(middle - 1):
            start = middle
        else:
            end = middle
    return start
