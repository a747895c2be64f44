"""vLLM's `LLMEngine`, for programs that add requests and step: an `LLM` with the names that it has there."""

from collections.abc import Iterable

from .llm import LLM


class LLMEngine(LLM):
    """An engine to be driven by hand: `add_request`, then `step` while `has_unfinished_requests`.

    It is an `LLM`, with the same options; `LLMEngine.from_engine_args` takes vLLM's. The engine computes on a thread of
    its own, so requests also go on between two calls of `step`.
    """

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests early, by name, as `abort` does one."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self.abort(request_id)

    def get_num_unfinished_requests(self) -> int:
        """Return how many requests `step` has more to return of."""
        return self._hand_driven.unfinished


def view(llm: LLM) -> LLMEngine:
    """Return the engine of an `LLM` under vLLM's names: the same one."""
    made = object.__new__(LLMEngine)
    made.__dict__.update(llm.__dict__, _owner=llm)  # an LLM that nobody holds closes its engine
    return made
