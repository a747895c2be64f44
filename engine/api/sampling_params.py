"""How one request is sampled and when it stops. Names and meanings are vLLM's. No JAX here.

What a model's vocabulary decides (whether a token id exists, how a bad word is spelled) is for `resolve_sampling.py`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from ..structured.params import StructuredOutputsParams
from .vllm_names import names_missing_fields, unknown
from .vllm_tables import SAMPLING

# As vLLM's default limit.
MAX_N = 16384
_MOST_SEED = 2**63 - 1
_SEED = "a whole number from 0 to 2**63 - 1"


class RequestOutputKind(IntEnum):
    """What each output of a request under way holds; names and values are vLLM's."""

    CUMULATIVE = 0  # all so far
    DELTA = 1  # what is new since the output before
    FINAL_ONLY = 2  # all, once it has ended; there is no output before


def _assignable[T](made: type[T]) -> type[T]:
    """Let a frozen dataclass be assigned to: frozen, its constructor is three times as fast."""

    def assign(self: T, name: str, value: object) -> None:
        known = [one.name for one in fields(made)]  # type: ignore[arg-type]
        if name not in known:
            raise AttributeError(unknown(made.__name__, "field", name, SAMPLING, known))
        self.__dict__["_is_checked"] = False  # first: another thread may copy it between the two
        self.__dict__[name] = value

    setattr(made, "__setattr__", assign)  # noqa: B010 (mypy)
    return made


@names_missing_fields(SAMPLING)
@_assignable
@dataclass(frozen=not TYPE_CHECKING, unsafe_hash=True)  # type: ignore[literal-required]
class SamplingParams:
    """Sampling and stopping of one request, with vLLM's names, defaults and meanings.

    Fields may be assigned to, as vLLM's scripts do; what was assigned is checked when a request starts with it, and a
    request that has started keeps what it started with.

    It differs from vLLM where a static shape has to bound it: bad words are at most 64 token sequences of at most 8
    tokens. Greedy sampling may ask for n > 1, and gets n equal completions. There is no
    `spaces_between_special_tokens`, because no supported tokenizer adds any.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the field, the value and the range.
    """

    n: int = 1  # completions of the prompt; completion i draws with seed + i
    presence_penalty: float = 0.0  # -2 to 2, subtracted once from the logit of every token that was generated
    frequency_penalty: float = 0.0  # -2 to 2, subtracted from a token's logit for every time that it was generated
    repetition_penalty: float = 1.0  # above 0; divides positive, multiplies negative logits of prompt and output tokens
    temperature: float = 1.0  # at most 1e6; 0 (and anything below 1e-5) always takes the most likely token
    top_p: float = 1.0  # in (0, 1]; keeps the smallest set of most likely tokens whose probabilities reach it
    top_k: int = 0  # keeps so many of the most likely tokens, of equally likely ones the lower ids; 0 or -1 keeps all
    min_p: float = 0.0  # in [0, 1]; drops tokens less likely than this times the most likely one
    seed: int | None = None  # 0 to 2**63 - 1; None or -1: drawn from the engine's seed and the request's number
    stop: str | Sequence[str] | None = None  # texts that end the completion; `text` is cut before one, `token_ids` not
    stop_token_ids: Sequence[int] | None = None  # end the completion as EOS does; kept in `token_ids`, not in `text`
    ignore_eos: bool = False  # go on after EOS
    max_tokens: int | None = 16  # the most tokens to generate; None: up to `max_model_len`
    min_tokens: int = 0  # EOS, stop tokens and stop strings do not end the completion before this many tokens
    # Report the log-probabilities of each token and of this many most likely ones: 0 to the engine's `max_logprobs`, or
    # -1: all, where the engine has max_logprobs=-1.
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None  # in place of the most likely tokens, where max_logprobs=-1
    prompt_logprobs: int | None = None  # likewise for the prompt's tokens; the request does not use the prefix cache
    detokenize: bool = True  # False leaves `text` empty, and allows no stop strings
    skip_special_tokens: bool = True  # leave control tokens out of the text
    include_stop_str_in_output: bool = False  # cut the text behind the stop string, and show a stop token in it
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits: -1e6 to 1e6, or -inf
    allowed_token_ids: Sequence[int] | None = None  # no other token may be generated; None: all may
    bad_words: Sequence[str] | None = None  # texts not to be completed, as spelled at a text's start and behind a space
    # Tokens that are the answer, whatever the model would say: their log-probabilities are wanted. `LLM.generate`
    # alone replays them, and nothing is drawn. n has to be 1, and prompt_logprobs None.
    trace_decode_token_ids: Sequence[int] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # of `AsyncLLM.generate` and `LLM.step` while it runs
    structured_outputs: StructuredOutputsParams | None = None  # what the answer has to keep to, such as a JSON schema

    def __post_init__(self) -> None:
        """Check every value, and turn lists into tuples, which nobody can change afterwards."""
        self._check_numbers()
        self._check_lengths()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            _check(name, getattr(self, name), lambda x: isinstance(x, bool), "True or False")
        kinds = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
        _check("output_kind", self.output_kind, lambda x: isinstance(x, RequestOutputKind), f"one of {kinds}")
        self._check_lists()
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need the text: leave detokenize on, or use stop_token_ids.")
        if self.structured_outputs is not None:
            self._check_structured()
        self.__dict__["_is_checked"] = True

    def _check_structured(self) -> None:
        """Refuse what cannot go with an answer that has to keep to a grammar."""
        _check(
            "structured_outputs",
            self.structured_outputs,
            lambda x: isinstance(x, StructuredOutputsParams),
            "StructuredOutputsParams",
        )
        if self.ignore_eos:
            raise ValueError("structured_outputs ends where its grammar ends: leave ignore_eos out.")
        if self.allowed_token_ids is not None:
            raise ValueError(
                "structured_outputs and allowed_token_ids may leave no token to choose: leave one of the two out."
            )
        if self.logit_bias and -math.inf in self.logit_bias.values():
            raise ValueError(
                "structured_outputs and a logit_bias of -inf may leave no token to choose: use a bias such as -100."
            )

    def clone(self) -> "SamplingParams":
        """Return the same parameters in an object of their own, checked.

        Raises:
            ValueError: something that was assigned is out of range.
        """
        twin = object.__new__(SamplingParams)
        twin.__dict__.update(self.__dict__)
        if not twin.__dict__["_is_checked"]:
            twin.__post_init__()
        return twin

    @classmethod
    def from_optional(cls, **given: Any) -> "SamplingParams":
        """Make parameters of those that are not None; the others are the defaults.

        Raises:
            TypeError: as the constructor.
            ValueError: likewise.
        """
        return cls(**{name: value for name, value in given.items() if value is not None})

    def with_seed(self, seed: int) -> "SamplingParams":
        """Return the same parameters with another seed, without checking the others again.

        Raises:
            ValueError: the seed is not from 0 to 2**63 - 1.
        """
        _check_int("seed", seed, 0, _MOST_SEED, _SEED)
        twin = self.clone()
        twin.__dict__["seed"] = seed
        return twin

    def _check_numbers(self) -> None:
        _check_real("temperature", self.temperature, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6")
        _check_real("top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        _check_real("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_real(name, getattr(self, name), lambda x: -2 <= x <= 2, "a number from -2 to 2")
        # The bounds are those of float32 arithmetic.
        wanted = "a number above 0 (1e-6 to 1e6)"
        _check_real("repetition_penalty", self.repetition_penalty, lambda x: 1e-6 <= x <= 1e6, wanted)
        _check_int("top_k", self.top_k, -1, 2**31 - 1, "a whole number, 1 or more, or 0 (all tokens)")
        if self.seed == -1 and _is_int(self.seed):
            self.__dict__["seed"] = None
        if self.seed is not None:
            _check_int("seed", self.seed, 0, _MOST_SEED, _SEED)

    def _check_lengths(self) -> None:
        _check_int("n", self.n, 1, MAX_N, f"a whole number from 1 to {MAX_N}")
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None, "a whole number, 1 or more")
        _check_int("min_tokens", self.min_tokens, 0, None, "a whole number, 0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is not usable: it must be at most max_tokens={self.max_tokens}."
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1, None, "a whole number, 0 or more, or -1 (all tokens)")

    def _check_trace(self, given: Sequence[int]) -> None:
        wanted = "a list of token ids, 0 or more"
        _check("trace_decode_token_ids", given, lambda x: isinstance(x, Sequence) and not isinstance(x, str), wanted)
        for token in given:
            _check_int("trace_decode_token_ids", token, 0, None, wanted)
        if not given or self.n != 1 or self.prompt_logprobs is not None:
            raise ValueError("trace_decode_token_ids need at least one token, n=1 and no prompt_logprobs.")
        self.__dict__["trace_decode_token_ids"] = tuple(map(int, given))

    def _check_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        own = self.__dict__
        own["stop"] = _texts("stop", stop)
        own["bad_words"] = _texts("bad_words", self.bad_words)
        own["stop_token_ids"] = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.trace_decode_token_ids is not None:
            self._check_trace(self.trace_decode_token_ids)
        if self.logprob_token_ids is not None:
            own["logprob_token_ids"] = _token_ids("logprob_token_ids", self.logprob_token_ids)
            own["logprobs"] = -1
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError(
                    "allowed_token_ids=[] is not usable: it must hold a token id, or be None to allow all."
                )
            own["allowed_token_ids"] = allowed
        if self.logit_bias is not None:
            own["logit_bias"] = _biases(self.logit_bias)


def check_params(given: object) -> SamplingParams:
    """Return what callers give as parameters; raise ValueError where it is something else."""
    if isinstance(given, SamplingParams):
        return given
    raise ValueError(f"sampling_params of type {type(given).__name__} are not usable: give SamplingParams.")


def _texts(name: str, given: object) -> tuple[str, ...]:
    """Check texts, and return them without repetitions, in their order; none for None."""
    if given is None:
        return ()
    wanted = "a list of texts that are not empty"
    _check(name, given, lambda x: isinstance(x, Iterable) and not isinstance(x, str | bytes | Mapping), wanted)
    texts = tuple(cast(Iterable[str], given))
    for text in texts:
        _check(name, text, lambda x: isinstance(x, str) and x != "", wanted)
    return tuple(dict.fromkeys(texts))


def _token_ids(name: str, given: object) -> tuple[int, ...]:
    """Check token ids, and return them without repetitions, in their order; none for None."""
    if given is None:
        return ()
    wanted = "a list of token ids, 0 or more"
    _check(name, given, lambda x: isinstance(x, Iterable) and not isinstance(x, str | bytes | Mapping), wanted)
    ids = tuple(cast(Iterable[int], given))
    for token in ids:
        _check_int(name, token, 0, None, wanted)
    return tuple(dict.fromkeys(map(int, ids)))


def _biases(given: object) -> dict[int, float]:
    wanted = "a dict of token ids and numbers from -1e6 to 1e6, or -inf"
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias={given!r} is not usable: it must be {wanted}.")
    for token, bias in given.items():
        _check_int("logit_bias", token, 0, None, wanted)
        _check_real("logit_bias", bias, lambda x: -1e6 <= x <= 1e6 or x == -math.inf, wanted)
    return {int(token): float(bias) for token, bias in given.items()}


def _check(name: str, value: object, is_good: Callable[[object], bool], wanted: str) -> None:
    if not is_good(value):
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}.")


def _check_real(name: str, value: float, in_range: Callable[[float], bool], wanted: str) -> None:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    _check(name, value, lambda _: is_real and in_range(value), wanted)


def _check_int(name: str, value: int, least: int, most: int | None, wanted: str) -> None:
    _check(name, value, lambda _: _is_int(value) and value >= least and (most is None or value <= most), wanted)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
