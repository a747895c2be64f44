"""What a caller gets back, shaped as vLLM's outputs are. Control-plane module: no JAX here."""

from dataclasses import dataclass

from .protocol import FinishReason
from .request import Timeline


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. `text` leaves special tokens out; `token_ids` holds every token, a final stop token included."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestOutput:
    """A request's result. `error` says in one sentence why a request with finish_reason "error" failed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timeline: Timeline
    error: str | None = None


@dataclass(frozen=True)
class TextDelta:
    """What one step of a stream adds: new text (never taken back), its tokens, and why it ended (None: goes on)."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
