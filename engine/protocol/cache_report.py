"""What the prefix cache did for a prompt: how much of it was cached and, for what was not, why.

Plain data. The reasons are found in `scheduler/cache_reports.py`; what a caller reads is this.
"""

from enum import StrEnum

import msgspec


class MissReason(StrEnum):
    """Why prompt tokens were not found in the prefix cache."""

    NEVER_SEEN = "never seen"  # no cache of this engine is known to have had them
    EVICTED = "evicted"  # their pages were given to others
    DIFFERS = "differs"  # the session's earlier request has other tokens there, or before them
    OTHER_MESH = "other mesh"  # they are cached, but not on the mesh that the prompt went to
    NOT_REUSABLE = "not reusable"  # the engine or the request does not let them be reused
    WEIGHTS_CHANGED = "weights changed"  # `update_params` has made their KV void
    MESH_LOST = "mesh lost"  # the mesh that had them has failed
    LAST_PAGE = "last page"  # behind the last full page, or the last token of a prompt that is cached to its end


class Miss(msgspec.Struct, frozen=True, gc=False):
    """Prompt tokens that follow each other and were computed, all for one reason. What a reason has not is None."""

    reason: MissReason
    tokens: int
    at: float | None = None  # EVICTED, WEIGHTS_CHANGED, MESH_LOST: in seconds on the engine's clock; None: not known
    mesh: int | None = None  # OTHER_MESH: one that has them
    # DIFFERS: the position of the first token that is another in the earlier request; None: only its block is known.
    token: int | None = None
    block: int | None = None  # DIFFERS: the number of the first block that is another, in both requests
    earlier_blocks: int | None = None  # DIFFERS: how many blocks the earlier request had
    because: str | None = None  # NOT_REUSABLE: what does not let them be reused

    def __str__(self) -> str:
        """Say it in a few words."""
        said = f"{self.tokens} {self.reason}"
        if self.at is not None:
            said += f" at {self.at:.3f} s"
        if self.mesh is not None:
            said += f" {self.mesh}"
        if self.block is not None:
            where = "" if self.token is None else f"from token {self.token} on, "
            said += f" {where}in block {self.block} of {self.earlier_blocks}"
        return said if self.because is None else f"{said}: {self.because}"


class PrefixCacheReport(msgspec.Struct, frozen=True, gc=False):
    """What the prefix cache did for a prompt when it first ran.

    `cached_tokens` and the tokens of all misses are the prompt's tokens. The cached ones come first, and then the
    misses in the order of the prompt.
    """

    cached_tokens: int
    missed: tuple[Miss, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        return "; ".join([f"{self.cached_tokens} cached", *map(str, self.missed)])
