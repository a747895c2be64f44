"""Packs a request's sampling parameters on the host into its row of the device's sampling state."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingPlan
from .request_state import DenseRows, Flag, Float, Int, Seen


def is_dense(plan: SamplingPlan) -> bool:
    """Return whether any parameter of the plan needs a dense row."""
    return bool(
        plan.repetition_penalty != 1
        or plan.presence_penalty
        or plan.frequency_penalty
        or plan.logit_bias
        or plan.allowed_token_ids is not None
        or plan.bad_words
        or (plan.min_tokens > 0 and plan.stop_ids)
    )


def scalars_of(plan: SamplingPlan, prompt_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack one row of `Scalars` on the host: [len(Float)] float32 and [len(Int)] int32.

    `prompt_len` is the length of the caller's prompt without generated tokens. The token to feed next is left 0: the
    step that samples it stores it.
    """
    floats, ints = np.zeros(len(Float), np.float32), np.zeros(len(Int), np.int32)
    floats[Float.TEMPERATURE] = plan.temperature
    floats[Float.TOP_P] = plan.top_p
    floats[Float.MIN_P] = plan.min_p
    floats[Float.REPETITION_PENALTY] = plan.repetition_penalty
    floats[Float.PRESENCE_PENALTY] = plan.presence_penalty
    floats[Float.FREQUENCY_PENALTY] = plan.frequency_penalty
    ints[Int.TOP_K] = plan.top_k
    ints[Int.SEED] = np.uint32(plan.seed).view(np.int32)
    ints[Int.MIN_LEN] = prompt_len + plan.min_tokens
    ints[Int.FLAGS] = is_dense(plan) * Flag.DENSE | (plan.logprobs is not None) * Flag.LOGPROBS
    return floats, ints


def dense_row(plan: SamplingPlan, prompt: np.ndarray, outputs: Sequence[int], vocabulary: int) -> DenseRows:
    """Build the dense row of one request from host arrays without a leading axis.

    `prompt` [n] is the caller's prompt. `outputs` are generated tokens that are counted here, because no later step
    feeds them through `count_fed`.
    """
    seen = np.zeros(vocabulary, np.int32)
    seen[prompt] = Seen.IN_PROMPT
    # A checkpoint may name stop tokens that the model cannot produce.
    seen[[token for token in plan.stop_ids if token < vocabulary]] |= int(Seen.IS_STOP)
    np.add.at(seen, np.asarray(outputs, np.int32), Seen.GENERATED)
    recent = np.full(MAX_BAD_WORD_TOKENS - 1, -1, np.int32)
    newest = list(outputs)[-len(recent) :]
    recent[len(recent) - len(newest) :] = newest
    host: Any = (seen, _bias(plan, vocabulary), _bad_words(plan), recent)
    return DenseRows(*host)


def _bias(plan: SamplingPlan, vocabulary: int) -> np.ndarray:
    bias = np.zeros(vocabulary, np.float32)
    if plan.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(plan.allowed_token_ids)] = 0
    for token, value in plan.logit_bias.items():
        bias[token] += value
    return bias


def _bad_words(plan: SamplingPlan) -> np.ndarray:
    words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for row, word in zip(words, plan.bad_words, strict=False):
        row[len(row) - len(word) :] = word
    return words
