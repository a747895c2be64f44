"""What the host makes of a request's sampling parameters: the stages that it needs, and its rows on the device."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingPlan
from .request_state import DenseRows, Flag, Float, Int, Seen


class Stage(StrEnum):
    """A stage of sampling (`sampler.py`), in the order in which stages run."""

    ADJUST = "adjust"
    TOP_K = "top_k"
    TOP_P = "top_p"
    DRAW = "draw"
    SCORE = "score"


def stages_of(plan: SamplingPlan) -> frozenset[Stage]:
    """Return the stages that a request needs behind its steps; a greedy one that changes no logits needs none."""
    is_random = plan.temperature > 0
    needs = {
        Stage.ADJUST: plan.is_dense,
        Stage.TOP_K: is_random and plan.top_k > 0,
        Stage.TOP_P: is_random and plan.top_p < 1,
        Stage.DRAW: is_random or plan.is_dense,
        Stage.SCORE: plan.logprobs is not None,
    }
    return frozenset(stage for stage, is_needed in needs.items() if is_needed)


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
    ints[Int.FLAGS] = plan.is_dense * Flag.DENSE
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
