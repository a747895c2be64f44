"""Replays of known answers: the tokens are the caller's, their log-probabilities the model's, as vLLM's trace replay.

Nothing has to be sampled, so an answer is scored as the end of a prompt, in chunks, and then shown as the answer that
it is. Log-probabilities are therefore those of prompts: the model's own. No JAX here.
"""

from dataclasses import replace

import numpy as np

from ..errors import EngineError
from ..protocol.results import HostScores, TokenScores
from ..protocol.sampling_plan import SamplingPlan
from .client import EngineClient
from .collector import RequestCollector
from .job import Job
from .logprob_names import LogprobNames
from .outputs import CompletionOutput, RequestOutput
from .prompts import Prompt
from .sampling_params import SamplingParams


def scoring_of(job: Job, client: EngineClient) -> Job:
    """Return the job that scores a replay's answer, as far as `max_model_len` holds it.

    Raises:
        ValueError: parameters that do not go with a replay, or log-probabilities that are not the model's.
    """
    params, config = job.params, client.config
    if config.scores_processed and params.logprobs is not None:
        raise ValueError(
            f"trace_decode_token_ids and logprobs do not go with logprobs_mode={config.logprobs_mode!r}: nothing is "
            "drawn; use an engine with raw_logprobs or raw_logits."
        )
    room = config.max_model_len - 1 - len(job.prompt.ids)
    ids = np.concatenate([job.prompt.ids, np.array(params.trace_decode_token_ids or (), np.int32)[:room]])
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=params.logprobs or 0, detokenize=False)
    plan: SamplingPlan = client.resolve(scoring)
    return replace(job, prompt=Prompt(None, ids, job.prompt.salt), params=scoring, plan=plan, answers=None)


def replayed(collector: RequestCollector, job: Job, client: EngineClient) -> RequestOutput:
    """Return the result of a replay from that of its scoring.

    Raises:
        EngineError: the scoring failed or was aborted.
    """
    output, params, start = collector.output(), job.params, len(job.prompt.ids)
    if output.outputs[0].finish_reason in ("abort", "error"):
        raise EngineError(output.error or f"{output.request_id} was aborted before it was replayed.")
    answer = output.prompt_token_ids[start:]
    tokenizer = client.tokenizer if params.detokenize else None
    text, logprobs, total = "", None, None
    if tokenizer is not None:
        stream = tokenizer.stream(params.skip_special_tokens, job.prompt.token_ids)
        text = stream.push(answer) + stream.finish()
    if params.logprobs is not None:
        scores = _behind(collector.prompt_scores, start - 1)
        logprobs = list(LogprobNames(tokenizer, params.logprob_token_ids).named([scores], answer, params.logprobs))
        total = float(scores.logprob.sum(dtype=np.float64))
    completion = CompletionOutput(0, text, answer, total, logprobs, "length", None, output.outputs[0].timeline)
    shown = job.prompt
    return replace(
        output, prompt=shown.text, prompt_token_ids=shown.token_ids, prompt_logprobs=None, outputs=[completion]
    )


def _behind(pieces: list[HostScores], start: int) -> HostScores:
    return TokenScores(*(np.concatenate(column)[start:] for column in zip(*pieces, strict=True)))
