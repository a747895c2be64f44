"""How many requests a split of a pool's meshes would let keep to an SLO: a fluid model of both phases.

The arrivals of the window are taken to come again, in the same intervals, scaled to what is forecast; before them lies
what waits and runs now. Interval by interval, and for all splits at once:

- prefill is one queue of prompt tokens, in order of arrival. A prefill mesh computes full chunks; a mesh that does both
  alternates a chunk and a decode step, so that it has chunk / (chunk + decode step) of one's speed while it decodes;
- decode is processor sharing: requests spread evenly over the meshes that decode, each gets a token a step, and a step
  takes longer by its rows. On a mesh that does both, steps are longer by the share of its time that goes to prompts;
- a mesh has room for so many requests. What finds none waits for credit on the mesh that prefilled it, and where too
  many wait there, prompts wait too.

Then TTFT = the wait for the prompts before + the time of the prompt's own steps; TPOT = the mean time between tokens
over the request's life + the wait for credit and the hand-off, spread over its tokens; of the window's pairs of lengths
those count that keep to both, the two taken to be independent of each other. Not modelled: prompts that decode meshes
compute themselves, batch work, priorities, and what a mean over a life hides of it.

Nothing depends on the roles of the moment. A prediction costs bins x (a few dozen operations on arrays of the splits),
whatever the number of meshes and requests. No clock, no randomness.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..protocol.service import SLO
from .forecast import forecast
from .observations import Observations, Outlook, Split

type Array = npt.NDArray[np.float64]

_TINY = 1e-9
_KEPT = 0.5  # of a prefill mesh's memory, that KV may take which waits for credit (`MeshState.is_backed_up`)


def predict(observed: Observations, slo: SLO, splits: Sequence[Split], scale: float = 1.0) -> list[Outlook]:
    """Predict what becomes of the requests under each of these splits, at `scale` times the demand."""
    flow = _Flow(observed, splits, scale)
    flow.run()
    ttft, tpot = _ttft_met(flow, slo), _tpot_met(flow, slo)
    weights = flow.requests[:, None] / max(_TINY, float(flow.requests.cumsum()[-1]))
    goodput, first, each = (np.cumsum(weights * part, axis=0)[-1] for part in (ttft * tpot, ttft, tpot))
    return [
        Outlook(split, *(round(float(part[i]), 6) for part in (goodput, first, each, flow.served)))
        for i, split in enumerate(splits)
    ]


@dataclass
class _Flow:
    """The flow of the window's requests through each split: arrays [bins, splits]."""

    observed: Observations
    splits: Sequence[Split]
    scale: float
    requests: Array = field(init=False)  # that arrive in each interval
    tokens: Array = field(init=False)  # likewise prompt tokens to compute
    wait: Array = field(init=False)  # seconds before a prompt's own first step
    slower: Array = field(init=False)  # by how much a prompt takes longer on a mesh that does both
    on_both: Array = field(init=False)  # the part of the prompts that is prefilled there
    step: Array = field(init=False)  # seconds between two tokens on a decode mesh
    step_both: Array = field(init=False)  # and on a mesh that does both
    credit: Array = field(init=False)  # seconds that a request waits for credit
    served: Array = field(init=False)  # [splits] the part of all requests that had begun to decode at the window's end

    def __post_init__(self) -> None:
        demand = self.observed.demand
        self.requests = np.array(demand.requests, float) * (self.scale * forecast(demand.requests, demand.seconds))
        self.tokens = np.array(demand.tokens, float) * (self.scale * forecast(demand.tokens, demand.seconds))
        self.prefill, self.decode, self.both = (
            np.array([getattr(split, role) for split in self.splits], float) for role in Split._fields
        )
        pairs = np.array(demand.pairs, float)
        _, self.mean_prompt, self.mean_output = (float(x) for x in pairs.cumsum(axis=0)[-1] / len(pairs))
        self.mean_tokens = max(1.0, float(self.tokens.cumsum()[-1]) / max(1.0, float(self.requests.cumsum()[-1])))
        shape = len(self.requests), len(self.splits)
        names = ("wait", "slower", "on_both", "step", "step_both", "credit")
        self.wait, self.slower, self.on_both, self.step, self.step_both, self.credit = (np.zeros(shape) for _ in names)

    @property
    def seconds(self) -> float:
        """Return the seconds of an interval."""
        return self.observed.demand.seconds

    def run(self) -> None:
        """Follow the requests through the window."""
        times, size, queues = self.observed.times, self.observed.size, self.observed.queues
        decoders, prefillers = self.decode + self.both, self.prefill + self.both
        fill = min(size.chunk, size.prompts * self.mean_tokens)
        chunk = max(_TINY, times.prefill.at(fill))
        seats = min(size.slots, max(1.0, size.tokens / (self.mean_prompt + self.mean_output / 2)))
        room = decoders * seats
        kept = self.prefill * min(size.slots, 1 + _KEPT * size.tokens / self.mean_prompt)
        shape = len(self.splits)
        queue, waiting, decoding = (
            np.full(shape, float(x)) for x in (queues.to_prefill, queues.for_credit, queues.decoding)
        )
        for k in range(len(self.requests)):
            rows = np.minimum(decoding, room) / decoders
            step = times.decode.fixed + times.decode.each * np.maximum(1.0, rows)
            slower = 1 + step / chunk * (rows > _TINY)
            speed = fill / chunk * (self.prefill + self.both / slower)  # prompt tokens per second
            own = self.tokens[k] / max(1.0, self.requests[k]) * (self.requests[k] > 1) / 2  # of others in the interval
            late = np.maximum(0.0, self.tokens[k] - speed * self.seconds) / 2
            idle = self.mean_tokens / 2 * (prefillers - 1)  # in the middle of their prompts, which nobody waits for
            self.wait[k] = np.maximum(0.0, queue + late + own - idle) / speed
            free = np.maximum(0.0, room - decoding - waiting)
            most = np.maximum(0.0, free + kept - np.maximum(0.0, waiting)) * self.mean_tokens
            queue += self.tokens[k]
            done = np.minimum(np.minimum(queue, speed * self.seconds), most)
            queue -= done
            self.slower[k], self.on_both[k] = slower, self.both / slower / (self.prefill + self.both / slower)
            busy = done / (speed * self.seconds)  # the part of the time in which prompts are computed
            step_both = step / np.maximum(step / (chunk + step), 1 - busy / slower)
            self.step[k], self.step_both[k] = step, step_both
            waiting += done / self.mean_tokens
            seated = np.minimum(waiting, np.maximum(0.0, room - decoding))
            waiting -= seated
            decoding += seated
            pace = rows * (self.decode / step + self.both / step_both)  # tokens per second of all that decode
            ended = np.minimum(decoding, pace * self.seconds / self.mean_output)
            decoding -= ended
            self.credit[k] = waiting / np.maximum(_TINY, pace / self.mean_output)
        left = queue / self.mean_tokens + waiting
        everything = float(self.requests.cumsum()[-1]) + queues.to_prefill / self.mean_tokens + queues.for_credit
        self.served = 1 - np.minimum(1.0, left / max(_TINY, everything))

    def mean_over_life(self, step: Array) -> Array:
        """Average a time between tokens over the life of a mean request that begins in each interval."""
        bins = len(step)
        sums = np.concatenate([np.zeros((1, step.shape[1])), step.cumsum(axis=0)])
        life = np.maximum(1, np.minimum(bins, self.mean_output * step / self.seconds)).astype(int)
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

    result: Array = met(flow.step, flow.observed.times.handoff) * (1 - part) + met(flow.step_both, 0.0) * part
    return result
