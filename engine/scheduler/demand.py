"""The demand of the last minutes, counted as it arrives: requests and prompt tokens by interval, and pairs of lengths.

What is read of it is the part since demand has changed last (`forecast.steady_from`), taken to come again and again: in
the pattern of its newest intervals, at the mean of all of it. Of the lengths of an answer nobody knows before it ends,
and those that are long end late; so pairs are kept by the size of their prompts, and read in the proportions in which
prompts of these sizes arrive now.

Bounded whatever comes: a fixed number of intervals, sizes by powers of two, and of each size so many pairs, of which
one in so many that end is kept, so that they span about the window. Each call is O(1), but for the intervals in which
nothing came; reading is linear in intervals and pairs. No clock: callers say when.
"""

from collections import deque
from itertools import islice

from .forecast import steady_from
from .observations import Demand, Pair

_ENDED = 0.25  # of all that arrived: with fewer, those that ended are the shortest
_PATIENCE = 30.0  # seconds since the first arrival, after which answers are taken to be as long as theirs anyway


class _Size:
    """Prompts of one size: from a power of two to the next."""

    def __init__(self, pairs: int) -> None:
        self._most = pairs
        self.pairs = deque[Pair]()  # that ended
        self.ended = 0  # since the sample was looked at
        self.stride = 1  # one in so many is kept
        self._outputs = 0  # of the pairs

    def add(self, pair: Pair) -> None:
        """Count a request that ended, and keep it if it is its turn."""
        self.ended += 1
        if self.ended % self.stride and self.pairs:
            return
        self.pairs.append(pair)
        self._outputs += pair.output
        if len(self.pairs) > self._most:
            self._outputs -= self.pairs.popleft().output

    @property
    def output(self) -> float:
        """Return the mean length of the answers."""
        return self._outputs / len(self.pairs)


class _Interval:
    """What arrived in one interval, by size: requests and prompt tokens."""

    __slots__ = ("requests", "sizes", "tokens")

    def __init__(self) -> None:
        self.requests = self.tokens = 0  # of all sizes
        self.sizes: dict[int, tuple[int, int]] = {}

    def add(self, size: int, tokens: int) -> None:
        requests, before = self.sizes.get(size, (0, 0))
        self.sizes[size] = requests + 1, before + tokens
        self.requests += 1
        self.tokens += tokens


class DemandWindow:
    """What arrived and ended in the latest `memory` intervals of `seconds`, of which `bins` are forecast."""

    def __init__(self, bins: int, seconds: float, pairs: int, memory: int | None = None):
        """Begin with nothing; `pairs` are read, and at most as many kept of each size. `memory` None: `bins`."""
        self._seconds, self._bins, self._most = seconds, bins, pairs
        self._intervals = deque[_Interval](maxlen=(bins if memory is None else memory) + 1)
        self._last = 0  # the interval that the newest entry is of, counted from time 0
        self._changes = deque[int]()  # intervals of the memory in which demand was found to change
        self._sizes: dict[int, _Size] = {}
        self._first: float | None = None  # when the first arrived
        self._arrived = self._ended = 0  # since then
        self._are_lengths_known = False

    def arrived(self, t: float, prompt_tokens: int) -> None:
        """Count an interactive request."""
        self._go_to(t)
        self._first = t if self._first is None else self._first
        self._arrived += 1
        self._intervals[-1].add(prompt_tokens.bit_length(), prompt_tokens)

    def ended(self, to_compute: int, prompt: int, output: int) -> None:
        """Take in the lengths of a request that has ended by itself."""
        self._ended += 1
        size = self._sizes.get(prompt.bit_length())
        if size is None:
            size = self._sizes[prompt.bit_length()] = _Size(self._most)
        size.add(Pair(to_compute, prompt, output))

    def demand(self, now: float) -> Demand:
        """Return what comes from now on: the intervals since demand has changed last, as often as they fill the window.
        Of a prompt's tokens that part counts that the pairs had to compute."""
        self._go_to(now)
        whole = max(1, len(self._intervals) - 1)  # the interval that has just begun would look like a lull
        intervals = list(islice(self._intervals, whole))
        intervals = intervals[self._begin(intervals) :]
        pairs = self._sample(intervals)
        waited = 0.0 if self._first is None else now - self._first
        self._are_lengths_known |= self._ended >= _ENDED * self._arrived or waited >= _PATIENCE
        prompt = sum([pair.prompt for pair in pairs])
        part = sum([pair.to_compute for pair in pairs]) / prompt if prompt else 1.0
        seen, tokens = sum([one.requests for one in intervals]), sum([one.tokens for one in intervals])
        newest = intervals[-self._bins :]
        requests = self._repeated([float(one.requests) for one in newest], seen / len(intervals))
        return Demand(
            self._seconds, requests,
            self._repeated([part * one.tokens for one in newest], part * tokens / len(intervals)), pairs, seen,
            are_lengths_known=self._are_lengths_known,
        )  # fmt: skip

    def new_sample(self, seconds: float) -> None:
        """Choose how many of those that end are kept from here on, from how many have ended in so many seconds."""
        for size in self._sizes.values():
            a_window = size.ended * self._bins * self._seconds / seconds
            size.stride, size.ended = max(1, int(a_window / self._most)), 0

    def _begin(self, intervals: list[_Interval]) -> int:
        """Return the interval since which demand is as it is now, and remember it."""
        outputs = {size: found.output for size, found in self._sizes.items()}
        mean = sum(outputs.values()) / len(outputs) if outputs else 0.0
        tokens = [float(one.tokens) for one in intervals]
        to_decode = [sum([n * outputs.get(size, mean) for size, (n, _) in one.sizes.items()]) for one in intervals]
        oldest = self._last - len(self._intervals) + 1
        while self._changes and self._changes[0] <= oldest:
            self._changes.popleft()
        changes = [change - oldest for change in self._changes]
        since = changes[-1] if changes else 0
        begin = steady_from((tokens, to_decode), since, changes)
        if begin > since:
            self._changes.append(begin + oldest)
        return begin

    def _repeated(self, amounts: list[float], mean: float) -> list[float]:
        """Repeat amounts until they fill the window, at this mean."""
        turns, total = -(-self._bins // len(amounts)), sum(amounts)
        scale = mean * len(amounts) / total if total else 0.0
        return ([scale * amount for amount in amounts] * turns)[: self._bins]

    def _sample(self, intervals: list[_Interval]) -> list[Pair]:
        """Take pairs of each size in the proportions in which prompts of the sizes arrived. Where none of a size has
        ended yet, its answers are taken to be as those of the nearest."""
        arrived: dict[int, tuple[int, int]] = {}
        for one in intervals:
            for size, (requests, tokens) in one.sizes.items():
                before = arrived.get(size, (0, 0))
                arrived[size] = before[0] + requests, before[1] + tokens
        total = sum([requests for requests, _ in arrived.values()])
        if not self._sizes or not total:
            return []
        found: list[Pair] = []
        for size, (requests, tokens) in sorted(arrived.items()):
            near = min(self._sizes, key=lambda other: (abs(other - size), other))
            pairs, count = self._sizes[near].pairs, max(1, round(self._most * requests / total))
            chosen = [pairs[k * len(pairs) // count] for k in range(count)]
            if near != size:
                prompt = max(1, tokens // requests)
                chosen = [Pair(max(1, prompt * p.to_compute // p.prompt), prompt, p.output) for p in chosen]
            found += chosen
        return found

    def _go_to(self, t: float) -> None:
        interval = int(t / self._seconds)
        if not self._intervals:
            self._last = interval - 1
        for _ in range(min(interval - self._last, self._bins)):
            self._intervals.append(_Interval())
        self._last = max(self._last, interval)
