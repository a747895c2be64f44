"""What an executor keeps of the requests in the engine: for each, the `Accept` of its latest run."""

import numpy as np

from ..protocol.actions import Accept


class RequestRecords(dict[int, Accept]):
    """Records by request id."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: set[int] = set()  # ids of the requests whose tokens are to be scored

    def accept(self, request: Accept) -> None:
        """Take a request in, or its next run."""
        self[request.request_id] = request
        if request.plan.logprobs is not None:
            self.scored.add(request.request_id)

    def forget(self, request_id: int) -> None:
        """Drop a request that is over; one that never began a run is not here."""
        self.pop(request_id, None)
        self.scored.discard(request_id)

    def clear(self) -> None:
        """Drop every request."""
        super().clear()
        self.scored.clear()


def tokens_of(record: Accept, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` - 1 of a request, [stop - start] int32: its prompt, then what it has generated."""
    length = len(record.prompt)
    if stop <= length:
        return record.prompt[start:stop]
    if stop > length + len(record.generated):
        raise ValueError(f"token {stop - 1} of request {record.request_id} is unknown to the worker.")
    return np.concatenate((record.prompt[start:], record.generated[max(0, start - length) : stop - length]))
