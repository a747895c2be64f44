"""How one request is sampled, resolved to token ids: what `SamplingParams` means for one model. No JAX here.

`SamplingParams` is what a caller writes; `LLM` turns it into this with the tokenizer, and the device plane reads only
this. Values were checked on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingPlan:
    """Sampling of one request.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep all. `repetition_penalty` 1 and the other
    penalties 0 do nothing. `logit_bias`: added to a token's logit. `allowed_token_ids`: no other token may come (None:
    all may). `bad_words`: token sequences that may not be completed. `stop_ids`: tokens that end the request, and
    that may not come among the first `min_tokens`. `logprobs`: how many of the most likely tokens to report with each
    sampled one (None: no log-probabilities at all); `prompt_logprobs` likewise for the prompt.
    """

    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


# The most that `logprobs` and `prompt_logprobs` may ask for: a static size of the programs.
MAX_LOGPROBS = 20
# Bounds of `bad_words`: sequences of a request, and tokens of one.
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
