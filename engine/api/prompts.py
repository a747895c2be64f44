"""Prompts as callers write them, checked and turned into token ids. No JAX here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, cast

import numpy as np

from ...models.text.tokenizer import Tokenizer

type PromptLike = str | Sequence[int] | np.ndarray | Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt that passed every check: its text where it was given as text, and its token ids."""

    text: str | None
    token_ids: list[int]


def check_prompt(prompt: PromptLike, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Check a prompt and turn it into token ids: text, ids, {"prompt": text} or {"prompt_token_ids": ids}.

    Raises:
        ValueError: empty, without room for one more token, ids outside the vocabulary, or of another form.
    """
    text, ids = _read(prompt, partial(tokenizer.encode, at_most=max_model_len))
    if not ids:
        raise ValueError("The prompt is empty: give at least one token.")
    if len(ids) >= max_model_len:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and max_model_len={max_model_len} must hold it and at least one more: "
            "shorten it or raise max_model_len."
        )
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        stranger = next(i for i in ids if not 0 <= i < tokenizer.vocab_size)
        raise ValueError(
            f"The prompt holds token id {stranger}, which is outside 0 to {tokenizer.vocab_size - 1}: give ids of this "
            "model's tokenizer."
        )
    return Prompt(text, ids)


def check_continuation(prompt: Prompt, continuation: PromptLike, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Join `prompt` and `continuation`; nothing is put between them, and no special token before the second.

    Raises:
        ValueError: as `check_prompt`, of the two together, or an empty continuation.
    """
    _, ids = _read(continuation, tokenizer.encode_after)
    if not ids:
        raise ValueError("A continuation is empty: give at least one token.")
    return check_prompt([*prompt.token_ids, *ids], tokenizer, max_model_len)


def as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """Return one prompt or many as a list. A list of ints is one prompt, and so is an array; any other list is many."""
    if isinstance(prompts, str | bytes | Mapping | np.ndarray) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast(PromptLike, prompts)]
    return list(cast(Sequence[PromptLike], prompts))


def _read(prompt: PromptLike, encode: Callable[[str], list[int]]) -> tuple[str | None, list[int]]:
    if not isinstance(prompt, Mapping):
        return (prompt, encode(prompt)) if isinstance(prompt, str) else (None, _token_ids(prompt))
    match dict(prompt):
        case {"prompt": str(text), **rest} if not rest:
            return text, encode(text)
        case {"prompt_token_ids": ids, **rest} if not rest:
            return None, _token_ids(ids)
    raise ValueError(
        f"A prompt dict needs text under 'prompt' or ids under 'prompt_token_ids' and nothing else, not {list(prompt)}."
    )


def _token_ids(ids: object) -> list[int]:
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    listed: list[object] = [None] if isinstance(ids, str | bytes) or not isinstance(ids, Sequence) else list(ids)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in listed):
        raise ValueError("A prompt must be text or a list of token ids.")
    return [int(cast(int, i)) for i in listed]
