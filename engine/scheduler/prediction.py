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


def predict(
    observed: Observations, slo: SLO, splits: Sequence[Split], scale: float | Sequence[float] = 1.0
) -> list[Outlook]:
    """Predict what becomes of the requests under each of these splits, at `scale` times the demand, one for all or one
    for each."""
    flow = _Flow(observed, splits, [scale] * len(splits) if isinstance(scale, float | int) else scale)
    ttft, tpot = _ttft_met(flow, slo), _tpot_met(flow, slo)
    weights = (flow.requests / max(_TINY, float(flow.requests.cumsum()[-1])))[:, None]
    columns = (*((weights * part).cumsum(axis=0)[-1] for part in (ttft * tpot, ttft, tpot)), flow.served)
    return [Outlook(*found) for found in zip(splits, *(column.round(6).tolist() for column in columns), strict=True)]


class _Flow:
    """The flow of the window's requests through each split: arrays [bins, splits]."""

    def __init__(self, observed: Observations, splits: Sequence[Split], scales: Sequence[float]):
        """Follow the requests through the window."""
        demand, size, scale = observed.demand, observed.size, np.array(scales, float)
        self.observed, self.seconds = observed, demand.seconds
        requests, tokens = np.array(demand.requests, float), np.array(demand.tokens, float)
        self.requests = requests * forecast(demand.requests, demand.seconds)
        self.tokens = (tokens * forecast(demand.tokens, demand.seconds))[:, None] * scale
        self.each = tokens / np.maximum(1.0, requests)  # tokens of a prompt, by interval
        self.prefill, self.decode, self.both = np.array(splits, float).T
        prompt = sum([pair.prompt for pair in demand.pairs]) / len(demand.pairs)
        self._output = sum([pair.output for pair in demand.pairs]) / len(demand.pairs)
        self._all = scale * max(1.0, float(self.requests.cumsum()[-1]))
        self._mean = max(1.0, float(self.tokens[:, 0].cumsum()[-1] / self._all[0]))  # tokens to compute of a prompt
        self._fill = min(size.chunk, size.prompts * self._mean)  # tokens of a step where prompts wait
        self._chunk = max(_TINY, observed.times.prefill.at(self._fill))  # seconds of such a step
        seats = min(size.slots, max(1.0, size.tokens / (prompt + self._output / 2)))
        self._room = (self.decode + self.both) * seats
        self._kept = self.prefill * min(size.slots, 1 + _KEPT * size.tokens / prompt)
        # Of each interval: rows of a mesh that decodes, prompt tokens that wait when it begins, the part of it in which
        # prompts are computed, requests that wait for credit, and how many end in a second.
        shape = self.tokens.shape
        self._rows, self._queue, self._busy, self._waiting, self._pace = (np.empty(shape) for _ in range(5))
        self._run()
        self._derive()

    def _run(self) -> None:
        """Go from one interval to the next: whatever does not carry over is left to `_derive`."""
        queues, (fixed, each) = self.observed.queues, self.observed.times.decode
        decoders, room, mean, is_fused = self.decode + self.both, self._room, self._mean, self.observed.size.is_fused
        full = self.seconds * self._fill  # tokens of an interval, times the seconds of a step
        apart, both, most = full / self._chunk * self.prefill, full * self.both, room + self._kept
        leaving = decoders / self._output  # requests that end in an interval, times the seconds of a step, by rows
        from_apart, from_both = leaving * self.decode / decoders, leaving * self.both / decoders
        inside = np.full(len(room), float(queues.decoding + queues.for_credit))  # decode, or wait for credit
        queue = np.full(len(room), float(queues.to_prefill))
        for k, tokens in enumerate(self.tokens):
            decoding = np.minimum(inside, room)
            rows = decoding / decoders
            step = np.maximum(rows, 1.0) * each + (fixed + _TINY)
            slow = (rows * each if is_fused else np.minimum(rows, 1.0) * step) + self._chunk
            capacity = both / slow + apart  # prompt tokens of an interval
            self._rows[k], self._queue[k], self._waiting[k] = rows, queue, inside - decoding
            queue = queue + tokens
            done = np.minimum(np.minimum(queue, capacity), np.maximum(0.0, most - inside) * mean)
            queue -= done
            self._busy[k] = busy = done / capacity
            a_step = 1.0 / step
            pace = rows * (from_apart * a_step + from_both * (a_step + busy * (1.0 / np.maximum(slow, step) - a_step)))
            self._pace[k] = pace
            inside = np.maximum(0.0, inside + done / mean - pace * self.seconds)
        left = queue / mean + np.maximum(0.0, inside - room)
        everything = self._all + queues.to_prefill / mean + queues.for_credit
        self.served: Array = 1 - np.minimum(1.0, left / everything)  # had begun to decode at the end

    def _derive(self) -> None:
        """Derive what requests of each interval meet."""
        step, _, beside = self._steps(self._rows)
        self.slower = 1.0 + beside / self._chunk  # by how much a prompt takes longer on a mesh that does both
        worth = self.both / self.slower  # of such meshes, beside their decode steps
        speed = self._fill / self._chunk * (self.prefill + worth)  # prompt tokens per second
        self.on_both = worth / (self.prefill + worth)  # the part of the prompts that is prefilled there
        late = np.maximum(0.0, self.tokens - speed * self.seconds) / 2
        own = (self.each * (self.requests > 1) / 2)[:, None]  # of others that come in the same interval
        idle = self._mean / 2 * (self.prefill + self.both - 1)  # in the middle of their prompts: nobody waits for these
        self.wait = np.maximum(0.0, self._queue + late + own - idle) / speed  # seconds before a prompt's first step
        self.credit = self._waiting / np.maximum(_TINY, self._pace)  # seconds that a request waits for credit
        # Over the life of a request that begins in an interval: seconds between two tokens where no prompt is computed,
        # and where one is; the part of the time in which prompts are.
        bins = len(step)
        life = np.clip(self._output / self.seconds * step, 1, bins).astype(int)
        begins = np.arange(bins)[:, None]
        ends = np.minimum(bins, begins + life)
        self.fast, self.slow, _ = self._steps(_mean_between(self._rows, ends, ends - begins))
        self.busy = _mean_between(self._busy, ends, ends - begins)

    def _steps(self, rows: Array) -> tuple[Array, Array, Array]:
        """Return the seconds between two tokens with so many rows on a mesh: of a decode step; with a chunk before it
        (or in it, which makes it no shorter); and how much longer a chunk takes for the rows."""
        fixed, each = self.observed.times.decode
        step = np.maximum(rows, 1.0) * each + (fixed + _TINY)
        if self.observed.size.is_fused:
            beside = rows * each
            return step, np.maximum(self._chunk + beside, step), beside
        return step, self._chunk + step, np.minimum(rows, 1.0) * step

    def even_enough(self, target: float) -> Array:
        """Return the part of the requests on meshes that do both whose tokens come in time on the average of their
        lives, by which prompts happen to be computed meanwhile.

        The part b of a life in which there are chunks makes a token take 1 / (b / slow + (1 - b) / fast). Work that
        comes at random in steps of a prompt, dealt evenly to the meshes, gives b the variance b x prompt / (life x
        meshes), and a prompt is not divided: (prompt / life)^2 / 6. The normal distribution as a logistic one.
        """
        fast, slow, busy = self.fast, self.slow, self.busy
        often = busy / slow + (1 - busy) / fast  # tokens per second
        span, life = np.maximum(_TINY, 1 / fast - 1 / slow), self._output / often
        prompt = self._mean / self._fill * slow / life  # its steps, as a part of the life
        variance = busy * prompt / np.maximum(1.0, self.both) + prompt * prompt / 6
        errors = (often - 1 / target) / span / np.sqrt(np.maximum(_TINY, variance))
        part: Array = 1 / (1 + np.exp(-_LOGISTIC * np.clip(errors, -_FAR, _FAR)))
        return np.where(slow <= target, 1.0, part)


def _mean_between(values: Array, ends: npt.NDArray[np.int_], lengths: npt.NDArray[np.int_]) -> Array:
    """Average each column from each interval to its end."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(axis=0)])
    mean: Array = (np.take_along_axis(sums, ends, axis=0) - sums[:-1]) / lengths
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

    def met(handoff: float) -> Array:
        """Count outputs that are long enough to spread what comes before the second token, and those of one token."""
        spare = target - flow.fast
        least = np.where(spare > 0, 1 + (flow.credit + handoff) / np.maximum(_TINY, spare), np.inf)
        alone = np.searchsorted(outputs, 1, side="right")
        enough: Array = len(outputs) - np.maximum(alone, np.searchsorted(outputs, least, side="left")) + alone
        return enough / len(outputs)

    apart, both = met(flow.observed.times.handoff), met(0.0) * flow.even_enough(target)
    result: Array = apart * (1 - part) + both * part
    return result
