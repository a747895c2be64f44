"""Scores of continuations: each is a prompt of its own, of which the engine scores the last tokens.

Continuations that differ in their last token alone, as choices of a letter do, are one request: the tokens before are
computed once, and every last token is scored after them.
"""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
from msgspec.structs import replace

from ..errors import EngineError
from .client import EngineClient
from .collector import RequestCollector
from .job import Job
from .job_run import JobRun
from .outputs import Score
from .prompts import Prompt
from .sampling_params import SamplingParams

# One token has to be sampled, which nobody looks at; and that the prompt's are scored is the plan's affair alone, since
# outputs need not name them.
_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)


class Scorer:
    """What makes requests of continuations, and scores of their results."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def score(self, starts: Sequence[int], wholes: Sequence[Prompt]) -> list[Score]:
        """Score prompts with their continuations, which begin at token `starts`, 1 or more.

        Raises:
            ValueError: an engine that reports logits.
            EngineError: the engine is closed, or a request failed or was aborted.
        """
        if self._client.config.scores_logits:
            raise ValueError(
                "score() needs log-probabilities, and this engine reports logits: start it with "
                "logprobs_mode='raw_logprobs'."
            )
        groups: dict[tuple[int, bytes, str | None], list[int]] = {}
        for index, (start, whole) in enumerate(zip(starts, wholes, strict=True)):
            groups.setdefault((start, whole.ids[:-1].tobytes(), whole.salt), []).append(index)
        members, arrival = list(groups.values()), self._client.clock()
        plan = replace(self._client.resolve(_ONE_TOKEN), prompt_logprobs=0)
        jobs = [
            Job(
                wholes[first], _ONE_TOKEN, plan, arrival, scored_from=starts[first],
                alternatives=tuple(int(wholes[other].ids[-1]) for other in others),
            )
            for first, *others in members
        ]  # fmt: skip
        scores: dict[int, Score] = {}
        with closing(JobRun(self._client, jobs, None).results()) as results:
            for result in results:
                if result is not None:
                    number, collector = result
                    scores |= _scores(collector, members[number], starts, wholes)
        return [scores[index] for index in range(len(wholes))]


def _scores(
    collector: RequestCollector, members: Sequence[int], starts: Sequence[int], wholes: Sequence[Prompt]
) -> dict[int, Score]:
    """Score the continuations of one request, once it has ended."""
    output = collector.output()
    if output.outputs[0].finish_reason in ("abort", "error"):
        raise EngineError(output.error or f"{output.request_id} was aborted before it was scored.")
    length, others = len(wholes[members[0]].ids) - starts[members[0]], len(members) - 1
    last = slice(-length - others, None)  # an engine may have scored more
    logprobs = np.concatenate([scores.logprob for scores in collector.prompt_scores])[last].astype(np.float32)
    ranks = np.concatenate([scores.rank for scores in collector.prompt_scores])[last].astype(np.int32)
    made = {}
    for turn, index in enumerate(members):
        of_one = [*range(length - 1), length - 1 + turn]
        token_ids = wholes[index].ids[starts[index] :].tolist()
        total = float(logprobs[of_one].sum(dtype=np.float64))
        made[index] = Score(token_ids, logprobs[of_one], total, ranks[of_one])
    return made
