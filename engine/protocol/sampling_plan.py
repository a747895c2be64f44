"""How one request is sampled, resolved to token ids: what `SamplingParams` means for one model.

`SamplingParams` is what a caller writes; `api/resolve_sampling.py` turns it into this with the tokenizer, checked, and
the device plane reads only this.
"""

import msgspec


class SamplingPlan(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Sampling of one request; the defaults change nothing."""

    temperature: float  # 0: greedy
    seed: int
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)  # added to a token's logit
    allowed_token_ids: tuple[int, ...] | None = None  # no other token may come; None: all may
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that may not be completed
    stop_ids: frozenset[int] = frozenset()  # end the request; may not come among the first `min_tokens`
    min_tokens: int = 0
    logprobs: int | None = None  # of how many most likely tokens besides the sampled one, -1: all; None: none at all
    prompt_logprobs: int | None = None  # likewise for the prompt
    scored_from: int = 1  # the first of the prompt's tokens for which that holds
    alternatives: tuple[int, ...] = ()  # tokens that are scored besides in the place of the prompt's last

    @property
    def is_dense(self) -> bool:
        """Whether it changes logits, and so needs a dense row on the device: as many numbers as the vocabulary has."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
            or (self.min_tokens > 0 and self.stop_ids)
        )


# The most that `logprobs` and `prompt_logprobs` may ask for unless an engine's `max_logprobs` says otherwise.
MAX_LOGPROBS = 20
# Bounds of `bad_words`: sequences of a request, and tokens of one.
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
