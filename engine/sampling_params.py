"""How one request is sampled and when it stops. Names and meanings are vLLM's. Control-plane module: no JAX here."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request.

    `temperature` 0 is greedy. `top_p` in (0, 1] keeps the smallest set of most likely tokens whose probabilities
    reach it. `top_k` keeps the k most likely tokens; 0 keeps all. `seed` fixes the random stream of the request
    (None: drawn from the engine's seed and the request's number). `max_tokens` bounds the tokens generated.
    `stop_token_ids` end the request as EOS does; the stopping token stays in `token_ids` and out of `text`.
    `ignore_eos` goes on after EOS.

    Raises:
        ValueError: a value is out of range or not a number; the message names the field, the value and the range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse what sampling could only turn into nonsense later."""
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_real("temperature", self.temperature, self.temperature >= 0, "a finite number, 0 or more")
        _check_real("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check_int("top_k", self.top_k, self.top_k >= 0, "a whole number, 0 (all tokens) or more")
        _check_int("max_tokens", self.max_tokens, self.max_tokens >= 1, "a whole number, 1 or more")
        if self.seed is not None:
            _check_int("seed", self.seed, 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, token >= 0, "token ids, 0 or more")


def _check_real(name: str, value: object, in_range: bool, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not in_range:
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}.")


def _check_int(name: str, value: object, in_range: bool, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not in_range:
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}.")
