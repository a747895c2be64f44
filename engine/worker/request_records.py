"""What an executor keeps of the requests in the engine: for each, the `Accept` that came last."""

from collections.abc import Sequence

import numpy as np

from ..protocol.actions import Accept
from ..sampling.request_rows import Stage, stages_of


class RequestRecords(dict[int, Accept]):
    """The `Accept` of each request's latest run, by request id."""

    def __init__(self) -> None:
        super().__init__()
        self._needing: dict[Stage, set[int]] = {stage: set() for stage in Stage}  # ids of the requests that need it

    def accept(self, request: Accept) -> None:
        """Take a request in, its next run, or more of its tokens."""
        self[request.request_id] = request
        for stage in stages_of(request.plan):
            self._needing[stage].add(request.request_id)

    def forget(self, request_id: int) -> None:
        """Drop a request that has ended; nothing is recorded of one that never began a run."""
        self.pop(request_id, None)
        for ids in self._needing.values():
            ids.discard(request_id)

    def stages(self, ids: Sequence[int]) -> frozenset[Stage]:
        """Return the stages of sampling that any of these requests needs."""
        return frozenset(stage for stage, needing in self._needing.items() if needing and not needing.isdisjoint(ids))

    def is_dense(self, request_id: int) -> bool:
        """Return whether a request has a dense row."""
        return request_id in self._needing[Stage.ADJUST]

    def clear(self) -> None:
        """Drop every request."""
        super().clear()
        for ids in self._needing.values():
            ids.clear()


def tokens_of(record: Accept, start: int, stop: int) -> np.ndarray:
    """Return tokens `start` to `stop` - 1 of a request, [stop - start] int32: of its prompt, then its output."""
    length = len(record.prompt)
    if stop <= length:
        return record.prompt[start:stop]
    if stop > length + len(record.generated):
        raise ValueError(f"token {stop - 1} of request {record.request_id} is unknown to the worker.")
    return np.concatenate((record.prompt[start:], record.generated[max(0, start - length) : stop - length]))
