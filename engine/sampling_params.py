"""How one request is sampled and when it stops. Names and meanings are vLLM's. Control-plane module: no JAX here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real


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
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Iterable):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} is not usable: it must be a list of token ids.")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("temperature", self.temperature, _is_real, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6")
        _check("top_p", self.top_p, _is_real, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, _is_int, lambda x: 0 <= x < 2**31, "a whole number, 0 (all tokens) or more")
        _check("max_tokens", self.max_tokens, _is_int, lambda x: x >= 1, "a whole number, 1 or more")
        if self.seed is not None:
            _check("seed", self.seed, _is_int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1")
        for token in self.stop_token_ids:
            _check("stop_token_ids", token, _is_int, lambda x: x >= 0, "token ids, 0 or more")


def _check(
    name: str, value: float, has_type: Callable[[object], bool], in_range: Callable[[float], bool], wanted: str
) -> None:
    if not has_type(value) or not in_range(value):
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}.")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
