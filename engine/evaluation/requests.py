"""What requests of lm-evaluation-harness mean to an engine: tokens that are scored, and sampling parameters.

It does here what the harness's own class for transformers does, so that figures agree. Nothing of the harness is
imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...models.text.tokenizer import Tokenizer
from ..api.sampling_params import SamplingParams

# Names that tasks give the most tokens of an answer by, the first one first.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What a task may ask for besides, under the names of `SamplingParams`.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What means nothing where it has this value.
_IDLE = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}


class Scored(NamedTuple):
    """A context and a continuation whose likelihood is asked for, in tokens."""

    context: list[int]
    continuation: list[int]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return both; sorted by this, those that begin alike are neighbours."""
        return (*self.context, *self.continuation)


def scored(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Scored:
    """Cut what is too long from the left: the model sees `max_length` tokens, and the last is only predicted.

    Raises:
        ValueError: nothing to score, nothing before it, or a continuation that is longer than the model sees.
    """
    if not continuation or not context:
        what = "continuation" if not continuation else "context"
        raise ValueError(f"A request of the task has an empty {what}: there is nothing to score, or nothing before it.")
    if len(continuation) > max_length:
        raise ValueError(
            f"A continuation of the task has {len(continuation)} tokens, and the model sees {max_length}: raise "
            "max_model_len, or take the task without it."
        )
    kept = max_length + 1 - len(continuation)
    return Scored(list(context[-kept:]), list(continuation))


class Asked(NamedTuple):
    """How an answer is generated."""

    params: SamplingParams
    until: tuple[str, ...]  # texts at which it is cut
    max_tokens: int


def asked(given: Mapping[str, Any], tokenizer: Tokenizer, default_max_tokens: int) -> Asked:
    """Turn the `generation_kwargs` of a task into sampling parameters: greedy, unless it says do_sample or gives a
    temperature.

    Raises:
        ValueError: a name that means nothing here; names it.
    """
    left = dict(given)
    sizes = [left.pop(name, None) for name in _MOST]
    most = int(next((size for size in sizes if size is not None), default_max_tokens))
    until = _texts(left.pop("until", None))
    is_random = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", None) or 0.0)
    sampling = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
    for name, value in left.items():
        if value is not None and not (name in _IDLE and value == _IDLE[name]):
            known = ", ".join(("until", *_MOST, "do_sample", *_SAMPLING))
            raise ValueError(f"generation_kwargs has {name}={value!r}, which is not known here: it takes {known}.")
    if is_random and "temperature" not in given:
        temperature = 1.0  # as in transformers
    eos = tokenizer.special.eos
    ends = tuple(dict.fromkeys(filter(None, (*until, eos))))
    # Special tokens are in no text.
    ids = {text: tokenizer.backend.token_to_id(text) for text in ends}
    special = {text: found for text, found in ids.items() if found in tokenizer.control_ids}
    params = SamplingParams(
        temperature=0.0 if is_random is False else temperature,
        max_tokens=most,
        stop=[text for text in ends if text not in special],
        stop_token_ids=list(special.values()),
        **sampling,
    )
    return Asked(params, ends, most)


def answer_of(text: str, until: Sequence[str], think_end: str | None) -> str:
    """Cut an answer at the first of its ends, once what was thought before `think_end` is taken off."""
    if think_end:
        text = text.split(think_end)[-1].lstrip()
    for end in until:
        text = text.split(end)[0]
    return text


def _texts(until: object) -> tuple[str, ...]:
    if until is None or isinstance(until, str):
        return () if until is None else (until,)
    if isinstance(until, Sequence) and all(isinstance(text, str) for text in until):
        return tuple(until)
    raise ValueError(f"generation_kwargs has until={until!r}: give a text, or a list of texts.")
