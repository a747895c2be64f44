"""How many requests a split of a pool's meshes would let keep to an SLO: a fluid model of both phases.

The arrivals of the window are taken to come again, in the same intervals, scaled to what is forecast; before them lies
what waits and runs now. Interval by interval, and for all splits at once:

- prefill is one queue of prompt tokens, in order of arrival. A prefill mesh computes full chunks; a mesh that does both
  alternates a chunk and a decode step, so that it has chunk / (chunk + decode step) of one's speed while it decodes, or
  (fused) adds its rows to the chunk, chunk / (chunk + rows), since the weights are read once;
- decode is processor sharing: requests spread evenly over the meshes that decode, each gets a token a step, and a step
  takes longer by its rows. On a mesh that does both, steps are longer by the share of its time that goes to prompts;
- a mesh has room for so many requests. What finds none waits for credit on the mesh that prefilled it, and where too
  many wait there, prompts wait too.

Then TTFT = the wait for the prompts before + the time of the prompt's own steps; TPOT = the mean time between tokens
over the request's life + the wait for credit and the hand-off, spread over its tokens; on meshes that do both it varies
by the prompts that come meanwhile (`even_enough`). Of the window's pairs of lengths those count that keep to both, the
two taken to be independent of each other. Not modelled: prompts that decode meshes compute themselves, batch work,
priorities, and what a mean over a life hides of it elsewhere.

Nothing depends on the roles of the moment. A prediction costs bins x (a few dozen operations on arrays of the splits),
whatever the number of meshes and requests. No clock, no randomness.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..protocol.service import SLO
from .forecast import forecast
from .observations import Observations, Outlook, Split

type Array = npt.NDArray[np.float64]

_TINY = 1e-9
_LOGISTIC, _FAR = 1.702, 40.0  # the logistic function of so many times x is nearest to the normal one of x
_KEPT = 0.5  # of a prefill mesh's memory, that KV may take which waits for credit (`MeshState.is_backed_up`)


def predict(observed: Observations, slo: SLO, splits: Sequence[Split], scale: float = 1.0) -> list[Outlook]:
    """Predict what becomes of the requests under each of these splits, at `scale` times the demand."""
    flow = _Flow(observed, splits, scale)
    ttft, tpot = _ttft_met(flow, slo), _tpot_met(flow, slo)
    weights = flow.requests[:, None] / max(_TINY, float(flow.requests.cumsum()[-1]))
    goodput, first, each = (np.cumsum(weights * part, axis=0)[-1] for part in (ttft * tpot, ttft, tpot))
    return [
        Outlook(split, *(round(float(part[i]), 6) for part in (goodput, first, each, flow.served)))
        for i, split in enumerate(splits)
    ]


class _Flow:
    """The flow of the window's requests through each split: arrays [bins, splits]."""

    def __init__(self, observed: Observations, splits: Sequence[Split], scale: float):
        """Follow the requests through the window."""
        demand, size = observed.demand, observed.size
        self.observed, self.seconds = observed, demand.seconds
        self.requests = np.array(demand.requests, float) * (scale * forecast(demand.requests, demand.seconds))
        self.tokens = np.array(demand.tokens, float) * (scale * forecast(demand.tokens, demand.seconds))
        self.prefill, self.decode, self.both = (
            np.array([getattr(split, role) for split in splits], float) for role in Split._fields
        )
        _, prompt, self._output = (
            float(x) for x in np.array(demand.pairs, float).cumsum(axis=0)[-1] / len(demand.pairs)
        )
        self._all = float(self.requests.cumsum()[-1])
        self._mean = max(1.0, float(self.tokens.cumsum()[-1]) / max(1.0, self._all))  # tokens to compute of a prompt
        self._fill = min(size.chunk, size.prompts * self._mean)  # tokens of a step where prompts wait
        self._chunk = max(_TINY, observed.times.prefill.at(self._fill))  # seconds of such a step
        seats = min(size.slots, max(1.0, size.tokens / (prompt + self._output / 2)))
        self._room = (self.decode + self.both) * seats
        self._kept = self.prefill * min(size.slots, 1 + _KEPT * size.tokens / prompt)
        shape = len(self.requests), len(splits)
        # Seconds between two tokens on a decode mesh, and on one that does both: on the average, and with a chunk; by
        # how much a prompt takes longer there; prompt tokens that wait when an interval begins; requests that wait for
        # credit, and how many end in a second.
        self.step, self.step_both, self.with_chunk, self.slower, self._queue, self._waiting, self._pace = (
            np.zeros(shape) for _ in range(7)
        )
        self._run()
        self._derive()

    def _run(self) -> None:
        """Go from one interval to the next: whatever does not carry over is left to `_derive`."""
        queues, (fixed, each) = self.observed.queues, self.observed.times.decode
        decoders, room, chunk, mean, output = self.decode + self.both, self._room, self._chunk, self._mean, self._output
        is_fused = self.observed.size.is_fused
        most, least, speed = room + self._kept, np.ones(len(room)), self.seconds * self._fill / chunk
        decoding = np.minimum(float(queues.decoding), room)
        waiting = queues.for_credit + (queues.decoding - decoding)
        queue = np.full(len(room), float(queues.to_prefill))
        for k, tokens in enumerate(self.tokens):
            rows = decoding / decoders
            step = fixed + each * np.maximum(rows, least) + _TINY
            # From one token to the next with a chunk between them, or in the step, which is no shorter for that.
            with_chunk = np.maximum(chunk + each * rows, step) if is_fused else chunk + step
            slower = 1.0 + (with_chunk - chunk) * np.minimum(rows, least) / chunk
            capacity = speed * (self.prefill + self.both / slower)  # prompt tokens of an interval
            self.step[k], self.with_chunk[k], self.slower[k], self._queue[k] = step, with_chunk, slower, queue
            queue = queue + tokens
            done = np.minimum(np.minimum(queue, capacity), np.maximum(0.0, most - decoding - waiting) * mean)
            queue -= done
            busy = done / capacity  # the part of the time in which prompts are computed
            self.step_both[k] = step_both = 1.0 / (busy / with_chunk + (1.0 - busy) / step)
            waiting = waiting + done / mean
            seated = np.minimum(waiting, room - decoding)
            waiting -= seated
            decoding = decoding + seated
            pace = rows * (self.decode / step + self.both / step_both) / output
            self._pace[k], self._waiting[k] = pace, waiting
            decoding = np.maximum(0.0, decoding - pace * self.seconds)
        left = queue / mean + waiting
        everything = self._all + queues.to_prefill / mean + queues.for_credit
        self.served: Array = 1 - np.minimum(1.0, left / max(_TINY, everything))  # had begun to decode at the end

    def _derive(self) -> None:
        """Derive what requests of each interval meet."""
        alone = self.both / self.slower  # what meshes that do both are worth beside their decode steps
        speed = self._fill / self._chunk * (self.prefill + alone)  # prompt tokens per second
        self.on_both = alone / (self.prefill + alone)  # the part of the prompts that is prefilled there
        tokens, requests = self.tokens[:, None], self.requests[:, None]
        late = np.maximum(0.0, tokens - speed * self.seconds) / 2
        own = tokens / np.maximum(1.0, requests) * (requests > 1) / 2  # of others that come in the same interval
        idle = self._mean / 2 * (self.prefill + self.both - 1)  # in the middle of their prompts: nobody waits for these
        self.wait = np.maximum(0.0, self._queue + late + own - idle) / speed  # seconds before a prompt's first step
        self.credit = self._waiting / np.maximum(_TINY, self._pace)  # seconds that a request waits for credit

    def even_enough(self, target: float) -> Array:
        """Return the part of the requests on meshes that do both whose tokens come in time on the average of their
        lives, by which prompts happen to be computed meanwhile.

        The part b of a life in which there are chunks makes a token take 1 / (b / with_chunk + (1 - b) / step). Work
        that comes at random in steps of a prompt, dealt evenly to the meshes, gives b the variance b x prompt / (life x
        meshes), and a prompt is not divided: (prompt / life)^2 / 6. The normal distribution as a logistic one.
        """
        mean, fast, slow = (self.mean_over_life(step) for step in (self.step_both, self.step, self.with_chunk))
        span, life = np.maximum(_TINY, 1 / fast - 1 / slow), self._output * mean
        prompt = self._mean / self._fill * slow  # seconds of its steps
        busy = np.maximum(0.0, (1 / fast - 1 / mean) / span)
        variance = busy * prompt / (life * np.maximum(1.0, self.both)) + (prompt / life) ** 2 / 6
        errors = (1 / mean - 1 / target) / span / np.sqrt(np.maximum(_TINY, variance))
        part: Array = 1 / (1 + np.exp(-_LOGISTIC * np.clip(errors, -_FAR, _FAR)))
        return np.where(slow <= target, 1.0, part)

    def mean_over_life(self, step: Array) -> Array:
        """Average a time between tokens over the life of a mean request that begins in each interval."""
        bins = len(step)
        sums = np.concatenate([np.zeros((1, step.shape[1])), step.cumsum(axis=0)])
        life = np.maximum(1, np.minimum(bins, self._output * step / self.seconds)).astype(int)
        ends = np.minimum(bins, np.arange(bins)[:, None] + life)
        total: Array = np.take_along_axis(sums, ends, axis=0) - sums[:-1]
        mean: Array = total / (ends - np.arange(bins)[:, None])
        return mean


def _ttft_met(flow: _Flow, slo: SLO) -> Array:
    """Return the part of the requests of each interval that has its first token in time."""
    if slo.ttft_ms is None:
        return np.ones_like(flow.wait)
    terms, chunk = flow.observed.times.prefill, flow.observed.size.chunk
    own = np.sort([terms.each * pair.to_compute + terms.fixed * -(-pair.to_compute // chunk)
                   for pair in flow.observed.demand.pairs])  # fmt: skip
    left = slo.ttft_ms / 1000 - flow.wait
    apart = np.searchsorted(own, left, side="right") / len(own)
    both = np.searchsorted(own, left / flow.slower, side="right") / len(own)
    met: Array = apart * (1 - flow.on_both) + both * flow.on_both
    return met


def _tpot_met(flow: _Flow, slo: SLO) -> Array:
    """Return the part of the requests of each interval that has its other tokens in time."""
    if slo.tpot_ms is None:
        return np.ones_like(flow.wait)
    outputs = np.sort([pair.output for pair in flow.observed.demand.pairs])
    target, part = slo.tpot_ms / 1000, flow.both / (flow.decode + flow.both)

    def met(step: Array, handoff: float) -> Array:
        """Count outputs that are long enough to spread what comes before the second token, and those of one token."""
        spare = target - flow.mean_over_life(step)
        least = np.where(spare > 0, 1 + (flow.credit + handoff) / np.maximum(_TINY, spare), np.inf)
        alone = np.searchsorted(outputs, 1, side="right")
        enough: Array = len(outputs) - np.maximum(alone, np.searchsorted(outputs, least, side="left")) + alone
        return enough / len(outputs)

    apart, both = met(flow.step, flow.observed.times.handoff), met(flow.step, 0.0) * flow.even_enough(target)
    result: Array = apart * (1 - part) + both * part
    return result
