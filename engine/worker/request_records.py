"""What an executor keeps of the requests in the engine: for each, the `Accept` of its latest run."""

import numpy as np

from ..protocol.actions import Accept


class RequestRecords(dict[int, Accept]):
    """The `Accept` of each request's latest run, by request id."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: set[int] = set()  # ids of the requests whose tokens are to be scored

    def accept(self, request: Accept) -> None:
        """Record the run of a request that begins, in place of its earlier run."""
        self[request.request_id] = request
        if request.plan.logprobs is not None:
            self.scored.add(request.request_id)

    def forget(self, request_id: int) -> None:
        """Drop a request that has ended; nothing is recorded of one that never began a run."""
        self.pop(request_id, None)
        self.scored.discard(request_id)

    def clear(self) -> None:
        """Drop every request."""
        super().clear()
        self.scored.clear()


def tokens_of(record: Accept, start: int, stop: int) -> np.ndarray:
    """Return tokens `start` to `stop` - 1 of a request, [stop - start] int32: of its prompt, then its output."""
    length = len(record.prompt)
    if stop <= length:
        return record.prompt[start:stop]
    if stop > length + len(record.generated):
        raise ValueError(f"token {stop - 1} of request {record.request_id} is unknown to the worker.")
    return np.concatenate((record.prompt[start:], record.generated[max(0, start - length) : stop - length]))
