"""The reference for whole engines: the model with dense attention over the whole sequence, and sampling in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.loading import load_on_one_device
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.decoder import abstract_params, bind, dense_hidden


class DenseModel:
    """A checkpoint's model in float32, for sequences of up to `length` tokens."""

    def __init__(self, path, length=96):
        checkpoint = open_checkpoint(path)
        abstract = abstract_params(checkpoint.config, jnp.float32)
        self.tokenizer, self._length = checkpoint.tokenizer(), length
        self.params = load_on_one_device(checkpoint, "float32")

        @jax.jit
        def logits(params, ids):
            decoder = bind(abstract.graphdef, params)
            return decoder.logits(dense_hidden(decoder, ids))

        self._logits = logits

    def logits(self, ids):
        """Compute logits [n, V] float32, row i of the token after `ids[: i + 1]`; the padding comes last, unseen."""
        padded = np.array([*ids, *[0] * (self._length - len(ids))], np.int32)
        return np.asarray(self._logits(tuple(self.params.values()), padded))[: len(ids)]

    def logprobs(self, ids):
        """Compute natural log-probabilities [n, V] float64, row i of the token after `ids[: i + 1]`."""
        logits = self.logits(ids).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def greedy(self, prompt, count, adjust=lambda logits, prompt, generated: logits):
        """Generate `count` tokens after `prompt` (ids), each the most likely one after `adjust`."""
        generated = []
        for _ in range(count):
            logits = self.logits([*prompt, *generated])[-1].astype(np.float64)
            generated.append(int(adjust(logits, prompt, generated).argmax()))
        return generated


def adjuster(
    *,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    bias=None,
    allowed=None,
    bad=(),
    stop=(),
    min_tokens=0,
):
    """Make a function that adjusts the logits of one token as vLLM's parameters of these names mean it."""

    def adjust(logits, prompt, generated):
        logits = logits.copy()
        if allowed is not None:
            logits[np.setdiff1d(np.arange(len(logits)), allowed)] = -np.inf
        for word in bad:
            start = len(generated) - len(word) + 1
            if start >= 0 and generated[start:] == list(word[:-1]):
                logits[word[-1]] = -np.inf
        if len(generated) < min_tokens:
            logits[list(stop)] = -np.inf
        for token, value in (bias or {}).items():
            logits[token] += value
        for token in {*prompt, *generated}:
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(generated):
            logits[token] -= presence + frequency * generated.count(token)
        return logits

    return adjust


def processed(logits, plan, prompt, generated, are_logits=False):
    """Compute what a token of a `SamplingPlan` is drawn from: log-probabilities [V] float64 of logits [V], or logits.

    The order is vLLM's: allowed tokens and biases, penalties, temperature, min_p, top_k, top_p.
    """
    logits = adjuster(
        repetition=plan.repetition_penalty,
        presence=plan.presence_penalty,
        frequency=plan.frequency_penalty,
        bias=plan.logit_bias,
        allowed=None if plan.allowed_token_ids is None else list(plan.allowed_token_ids),
    )(logits, list(prompt), list(generated))
    if plan.temperature > 0:
        logits = logits / plan.temperature
        logits[np.exp(logits - logits.max()) < plan.min_p] = -np.inf
        order = np.argsort(-logits, kind="stable")
        if plan.top_k:
            logits[order[plan.top_k :]] = -np.inf
        masses = np.exp(logits[order] - logits.max())
        before = np.cumsum(masses) / masses.sum() - masses / masses.sum()
        if plan.top_p < 1:
            logits[order[before >= plan.top_p]] = -np.inf
    return logits if are_logits else logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
