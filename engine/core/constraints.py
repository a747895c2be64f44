"""The masks that a step is sent with, where answers keep to grammars.

A mask for a token needs every token before it. So a request with a constraint has no step dispatched ahead
(`scheduler/mesh_state.py`), and the masks of a step are made when it is dispatched, on the dispatching thread. Tokens
that a request has already, and that a run computes again, need none. What compiles grammars and follows them is
`structured/`; here `Constraint` (`submission.py`) is all that is known of it.
"""

from collections.abc import Mapping

import numpy as np

from ..protocol.actions import AllowTokens, Chunk, Decode, DecodeRow, Fused, Prefill
from .running_request import RunningRequest


def masks_of(
    action: Prefill | Decode | Fused, constrained: Mapping[int, RunningRequest]
) -> tuple[AllowTokens | None, dict[int, str]]:
    """Make the masks of a step; None: no row needs one. Also say which requests cannot be followed, and why."""
    chunks = () if isinstance(action, Decode) else tuple(chunk for chunk in action.chunks if chunk.is_last)
    rows: tuple[Chunk | DecodeRow, ...] = (*chunks, *(() if isinstance(action, Prefill) else action.rows))
    ids, masks, failed = [], [], dict[int, str]()
    for row in rows:
        running = constrained.get(row.request_id)
        if running is None or (constraint := running.submission.constraint) is None or row.kv_len != running.length:
            continue
        mask = np.empty(constraint.words, np.int32)
        constraint.fill(mask)
        failure = constraint.failure
        if failure is not None:
            failed[row.request_id] = failure
        ids.append(row.request_id)
        masks.append(mask)
    return (AllowTokens(action.mesh, action.step, tuple(ids), np.stack(masks)) if ids else None), failed
