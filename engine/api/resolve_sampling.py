"""From what a caller writes (`SamplingParams`) to what the device plane reads (`SamplingPlan`), for one tokenizer.

Everything that depends on the vocabulary is checked here, before a request starts. No JAX.
"""

import math
from collections.abc import Iterable

from ...models.text.tokenizer import Tokenizer
from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGPROBS, SamplingPlan
from .sampling_params import SamplingParams, check_params

# vLLM's: what is below counts as 0.
_LEAST_TEMPERATURE = 1e-5


def resolve(params: SamplingParams, tokenizer: Tokenizer, seed: int, max_logprobs: int = MAX_LOGPROBS) -> SamplingPlan:
    """Make the plan of one completion that draws with `seed`, for an engine with this `max_logprobs`.

    Raises:
        ValueError: no `SamplingParams`, more log-probabilities than the engine has, token ids outside the vocabulary,
            bad words that are too many or too long, or nothing left to choose from.
    """
    check_params(params)
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "trace_decode_token_ids", "logit_bias"):
        _check_ids(name, getattr(params, name) or (), tokenizer.vocab_size)
    _check_logprobs(params, tokenizer.vocab_size, max_logprobs)
    is_greedy = params.temperature < _LEAST_TEMPERATURE
    plan = SamplingPlan(
        temperature=0.0 if is_greedy else float(params.temperature),
        seed=seed,
        top_p=1.0 if is_greedy else float(params.top_p),
        top_k=0 if is_greedy or not 0 < params.top_k < tokenizer.vocab_size else int(params.top_k),
        min_p=0.0 if is_greedy else float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        logit_bias=dict(params.logit_bias or {}),
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(sorted(params.allowed_token_ids)),
        bad_words=_spell(params.bad_words or (), tokenizer),
        stop_ids=frozenset(params.stop_token_ids or ()) | eos_ids(params, tokenizer),
        min_tokens=int(params.min_tokens),
        logprobs=_whole(params.logprobs),
        prompt_logprobs=_whole(params.prompt_logprobs),
    )
    _check_choice(plan, tokenizer.vocab_size)
    return plan


def eos_ids(params: SamplingParams, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a completion as the model's own end."""
    return frozenset() if params.ignore_eos else frozenset(tokenizer.eos_token_ids)


def _whole(number: int | None) -> int | None:
    """Return numpy's whole numbers, which parameters may be, as Python's: plans go into messages."""
    return None if number is None else int(number)


def _check_logprobs(params: SamplingParams, vocab_size: int, most: int) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and most < (vocab_size if count == -1 else count):
            asked = "asks for the whole vocabulary" if count == -1 else "is too many"
            raise ValueError(
                f"{name}={count} {asked}, and the engine has max_logprobs={most}: ask for no more, or make the engine "
                f"with max_logprobs={count}."
            )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    strangers = [i for i in ids if i >= vocab_size]
    if strangers:
        raise ValueError(
            f"{name} holds token id {strangers[0]}, and the tokenizer's ids end at {vocab_size - 1}: remove it."
        )


def _spell(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Spell bad words in tokens, as vLLM's `update_from_tokenizer` makes them: each word as it starts a text, and
    behind a space where that spells it with as many tokens but another first one."""
    spelled: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special=False))
        if not bare:
            raise ValueError(f"bad_words holds {word!r}, which has no tokens: remove it.")
        spelled.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            spelled.append(spaced)
        if len(bare) > MAX_BAD_WORD_TOKENS:
            raise ValueError(
                f"bad_words holds {word!r}, which has {len(bare)} tokens, and {MAX_BAD_WORD_TOKENS} is the most: "
                "use a part of it."
            )
    if len(spelled) > MAX_BAD_WORDS:
        raise ValueError(f"bad_words are {len(spelled)} token sequences, and {MAX_BAD_WORDS} is the most: give fewer.")
    return tuple(spelled)


def _check_choice(plan: SamplingPlan, vocab_size: int) -> None:
    """Refuse parameters that leave no first token to choose."""
    banned = {i for i, bias in plan.logit_bias.items() if bias == -math.inf}
    banned.update(word[0] for word in plan.bad_words if len(word) == 1)
    if plan.min_tokens:
        banned.update(plan.stop_ids)
    allowed = range(vocab_size) if plan.allowed_token_ids is None else plan.allowed_token_ids
    if len(banned) >= len(allowed) and banned.issuperset(allowed):
        raise ValueError(
            "The sampling parameters leave no token to choose: allowed_token_ids, logit_bias, bad_words and min_tokens "
            "together forbid every one."
        )
