"""Beam search as vLLM has it: on top of requests for one token each, whose most likely tokens extend the beams.

A beam's score is its summed log-probability over its length, prompt included, to the power of `length_penalty`, as in
vLLM. Prompts of beams are cached prefixes but for their last tokens. It is slow next to sampling: every token of every
beam is a request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import EngineConfig, check_whole_number
from ..errors import EngineError
from .outputs import LogprobsAt, RequestOutput
from .prompts import Prompt
from .sampling_params import SamplingParams


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search, with vLLM's names and defaults.

    Raises:
        ValueError: a width or a number of tokens below 1, or a temperature below 0.
    """

    beam_width: int  # sequences that are kept and returned
    max_tokens: int  # the most tokens to generate
    ignore_eos: bool = False  # go on after EOS
    temperature: float = 0.0  # log-probabilities are the model's, whatever it is
    length_penalty: float = 1.0  # above 1 prefers long sequences
    include_stop_str_in_output: bool = False  # nothing reads it: there are no stop strings
    skip_special_tokens: bool = True  # leave control tokens out of the text

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            check_whole_number(name, getattr(self, name), 1)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature!r} is not usable: it must be 0 or more.")


@dataclass
class BeamSearchSequence:
    """One sequence, prompt and all."""

    tokens: list[int]
    logprobs: list[LogprobsAt] = field(repr=False)  # of each generated token, with those that it was chosen from
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best sequences of one prompt, the best one first."""

    sequences: list[BeamSearchSequence]


def check_search(prompts: Sequence[Prompt], params: object, config: EngineConfig) -> BeamSearchParams:
    """Refuse a search that this engine could not end.

    Raises:
        ValueError: no `BeamSearchParams`, an engine that reports logits, which do not add up, or a prompt whose beams
            would not fit into `max_model_len`.
    """
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params of type {type(params).__name__} are not usable: give BeamSearchParams.")
    if config.scores_logits:
        raise ValueError(
            "beam_search() adds log-probabilities, and this engine reports logits: start it with "
            "logprobs_mode='raw_logprobs'."
        )
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest + params.max_tokens > config.max_model_len:
        raise ValueError(
            f"A prompt of {longest} tokens and max_tokens={params.max_tokens} of a beam are more than "
            f"max_model_len={config.max_model_len}: lower max_tokens, shorten the prompt or raise max_model_len."
        )
    return params


class BeamSearch:
    """The beams of several prompts; `run` takes prompts and parameters to outputs, in order."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        params: BeamSearchParams,
        eos: frozenset[int],
        run: Callable[[list[dict[str, Any]], SamplingParams], list[RequestOutput]],
    ) -> None:
        self._params, self._eos, self._run = params, eos, run
        self._salts = [prompt.salt for prompt in prompts]
        self._beams = [[BeamSearchSequence(list(prompt.token_ids), [])] for prompt in prompts]
        self._completed: list[list[BeamSearchSequence]] = [[] for _ in prompts]
        # Twice as many candidates as beams, as in vLLM and Hugging Face transformers: half of them may be EOS.
        count = 2 * params.beam_width
        self._one = SamplingParams(logprobs=count, max_tokens=1, temperature=params.temperature, detokenize=False)

    def outputs(self) -> list[list[BeamSearchSequence]]:
        """Search, and return the best sequences of each prompt."""
        for _ in range(self._params.max_tokens):
            if not any(self._beams):
                break
            self._step()
        width = self._params.beam_width
        ended = [[*done, *beams] for done, beams in zip(self._completed, self._beams, strict=True)]
        return [sorted(sequences, key=self._score, reverse=True)[:width] for sequences in ended]

    def _step(self) -> None:
        """Extend every beam by one token."""
        flat = [
            {"prompt_token_ids": beam.tokens, "cache_salt": salt}
            for salt, beams in zip(self._salts, self._beams, strict=True)
            for beam in beams
        ]
        results = iter(self._run(flat, self._one))
        for index, beams in enumerate(self._beams):
            new = [one for beam in beams for one in self._extended(beam, next(results), self._completed[index])]
            self._beams[index] = sorted(new, key=self._score, reverse=True)[: self._params.beam_width]

    def _extended(
        self, beam: BeamSearchSequence, result: RequestOutput, completed: list[BeamSearchSequence]
    ) -> list[BeamSearchSequence]:
        """Return a beam's continuations; those that EOS ends go to the completed ones.

        Raises:
            EngineError: its request failed or was aborted.
        """
        completion, going = result.outputs[0], []
        if not completion.logprobs:
            raise EngineError(result.error or f"{result.request_id} was aborted before it extended a beam.")
        choices = completion.logprobs[0]
        for token, choice in choices.items():
            new = BeamSearchSequence(
                [*beam.tokens, token], [*beam.logprobs, choices], beam.cum_logprob + choice.logprob
            )
            if token in self._eos and not self._params.ignore_eos:
                new.finish_reason = "stop"
                completed.append(new)
            else:
                going.append(new)
        return going

    def _score(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in self._eos)
        return beam.cum_logprob / float(max(length, 1) ** self._params.length_penalty)
