"""Prompts as callers write them, checked and turned into token ids. No JAX here."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from ...models.text.tokenizer import Tokenizer
from .prompt_forms import REFUSAL, as_plain, split_prompts

type PromptLike = str | Iterable[int] | np.ndarray | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that passed every check: its text where it was given as text, and its token ids."""

    text: str | None
    ids: np.ndarray  # [n] int32, never written to
    salt: str | None = None  # its pages are shared with prompts of the same salt alone

    @cached_property
    def token_ids(self) -> list[int]:
        """The ids as a list."""
        ids: list[int] = self.ids.tolist()
        return ids


def check_prompt(prompt: PromptLike, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Check a prompt and turn it into token ids: text, ids, or a dict with "prompt" or "prompt_token_ids", and perhaps
    "cache_salt". With both the ids are run, and the text is what the output shows.

    Raises:
        ValueError: empty, without room for one more token, ids outside the vocabulary, or of another form.
    """
    return _checked(read_prompt(prompt), tokenizer, max_model_len)


class Given(NamedTuple):
    """A prompt as it was given: a text, token ids [n], which were not looked at, or both, and a salt."""

    text: str | None
    ids: np.ndarray | None
    salt: str | None = None


def read_prompt(prompt: PromptLike) -> Given:
    """Find a prompt's text and its token ids, at least one of them.

    Raises:
        ValueError: it has neither.
    """
    if not isinstance(prompt, Mapping):
        return Given(prompt, None) if isinstance(prompt, str) else Given(None, _token_ids(prompt))
    parts = {name: value for name, value in prompt.items() if value is not None}
    text, ids, salt = (parts.pop(name, None) for name in ("prompt", "prompt_token_ids", "cache_salt"))
    is_neither = text is None and "prompt_token_ids" not in prompt
    if parts or not isinstance(text, str | None) or is_neither:
        raise ValueError(
            "A prompt dict needs text under 'prompt' or ids under 'prompt_token_ids' and nothing else but a "
            f"'cache_salt', not {list(prompt)}."
        )
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt={salt!r} is not usable: it must be a text that is not empty.")
    return Given(text, None if ids is None and text is not None else _token_ids(ids), salt)


def _checked(given: Given, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    ids = given.ids
    if ids is None:
        assert given.text is not None
        ids = np.array(tokenizer.encode(given.text, at_most=max_model_len), np.int64)
    prompt = check_tokens(given.text, ids, tokenizer, max_model_len)
    return prompt if given.salt is None else replace(prompt, salt=given.salt)


def check_tokens(text: str | None, ids: np.ndarray, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Check token ids, [n] of whole numbers, that were given or are those of a text; raises as `check_prompt`."""
    if not len(ids):
        raise ValueError("The prompt is empty: give at least one token.")
    if len(ids) >= max_model_len:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and max_model_len={max_model_len} must hold it and at least one more: "
            "shorten it or raise max_model_len."
        )
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        (strangers,) = np.nonzero((ids < 0) | (ids >= tokenizer.vocab_size))
        raise ValueError(
            f"The prompt holds token id {ids[strangers[0]]}, which is outside 0 to {tokenizer.vocab_size - 1}: give "
            "ids of this model's tokenizer."
        )
    checked = ids.astype(np.int32)  # a copy, whatever it was
    checked.flags.writeable = False
    return Prompt(text, checked)


def check_ids_or_text(prompt: PromptLike, tokenizer: Tokenizer, max_model_len: int) -> str | Prompt:
    """Check all of a prompt that can be checked without tokenising it: a text comes back as it is.

    Raises:
        ValueError: as `check_prompt`.
    """
    given = read_prompt(prompt)
    if given.text is not None and given.ids is None and given.salt is None:
        return given.text
    return _checked(given, tokenizer, max_model_len)


def check_texts(
    texts: Sequence[str | Prompt], tokenizer: Tokenizer, max_model_len: int, *, is_rendered: bool = False
) -> list[Prompt]:
    """Check texts as `check_prompt` does, and raise as it does; they are tokenised together, on every core. What was
    checked before passes. `is_rendered`: they are conversations in the words of a chat template, which has written
    special tokens out.
    """
    new = [text for text in texts if isinstance(text, str)]
    encoded = iter(tokenizer.encode_batch(new, add_special=not is_rendered, at_most=max_model_len))
    return [
        check_tokens(text, np.array(next(encoded), np.int64), tokenizer, max_model_len)
        if isinstance(text, str)
        else text
        for text in texts
    ]


def check_continuation(prompt: Prompt, continuation: PromptLike, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Join `prompt` and `continuation`; nothing is put between them, and no special token before the second.

    The prompt's salt is that of both.

    Raises:
        ValueError: as `check_prompt`, of the two together, or an empty continuation, or one with a salt of its own.
    """
    given = read_prompt(continuation)
    if given.salt is not None:
        raise ValueError(f"A continuation has the cache_salt {given.salt!r}: give it with the prompt.")
    ids = np.array(tokenizer.encode_after(given.text or ""), np.int64) if given.ids is None else given.ids
    if not len(ids):
        raise ValueError("A continuation is empty: give at least one token.")
    joined = check_tokens(None, np.concatenate([prompt.ids, ids]), tokenizer, max_model_len)
    return replace(joined, salt=prompt.salt)


def as_list(prompts: PromptLike | Iterable[PromptLike]) -> list[PromptLike]:
    """Return one prompt or many, in any form that has an order, as a list; ValueError where they have none."""
    return split_prompts(prompts)


def _token_ids(ids: object) -> np.ndarray:
    """Return whole numbers as an array; looks at none of them by itself, since a prompt may have many."""
    plain = as_plain(ids)
    if isinstance(plain, np.ndarray):
        if plain.ndim == 1 and (plain.dtype.kind in "iu" or not len(plain)):
            return plain
        plain = plain.tolist()
    kinds: set[type] = set(map(type, plain))
    if bool in kinds or not all(issubclass(kind, Integral) for kind in kinds):
        raise ValueError(REFUSAL)
    try:
        return np.array(array("q", plain), np.int64)
    except OverflowError:  # a whole number, but no token's id
        return np.array(plain, object)
