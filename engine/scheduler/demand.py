"""The demand of the last minute, counted as it arrives: requests and prompt tokens by interval, and pairs of lengths.

What is read of it is the part since demand has changed last (`forecast.steady_from`), taken to come again and again. Of
the lengths of an answer nobody knows before it ends, and those that are long end late; so pairs are kept by the size
of their prompts, and read in the proportions in which prompts of these sizes arrive now.

Bounded whatever comes: a fixed number of intervals, sizes by powers of two, and of each size so many pairs, of which
one in so many that end is kept, so that they span about a window. Each call is O(1), but for the intervals in which
nothing came; reading is linear in intervals and pairs. No clock: callers say when.
"""

from collections import deque
from itertools import islice

from .forecast import steady_from
from .observations import Demand, Pair


class _Size:
    """Prompts of one size: from a power of two to the next."""

    def __init__(self, pairs: int) -> None:
        self.pairs = deque[Pair](maxlen=pairs)  # that ended
        self.ended = 0  # since the sample was looked at
        self.stride = 1  # one in so many is kept

    @property
    def output(self) -> float:
        """Return the mean length of the answers."""
        return sum([pair.output for pair in self.pairs]) / len(self.pairs)


class _Interval:
    """What arrived in one interval, by size: requests and prompt tokens."""

    __slots__ = ("sizes",)

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}

    def add(self, size: int, tokens: int) -> None:
        requests, before = self.sizes.get(size, (0, 0))
        self.sizes[size] = requests + 1, before + tokens

    @property
    def requests(self) -> int:
        return sum([requests for requests, _ in self.sizes.values()])

    @property
    def tokens(self) -> int:
        return sum([tokens for _, tokens in self.sizes.values()])


class DemandWindow:
    """What arrived and ended in the latest `bins` intervals of `seconds`."""

    def __init__(self, bins: int, seconds: float, pairs: int):
        """Begin with nothing; `pairs` are read, and at most as many kept of each size."""
        self._seconds, self._bins, self._most = seconds, bins, pairs
        self._intervals = deque[_Interval](maxlen=bins)
        self._last = 0  # the interval that the newest entry is of, counted from time 0
        self._sizes: dict[int, _Size] = {}

    def arrived(self, t: float, prompt_tokens: int) -> None:
        """Count an interactive request."""
        self._go_to(t)
        self._intervals[-1].add(prompt_tokens.bit_length(), prompt_tokens)

    def ended(self, to_compute: int, prompt: int, output: int) -> None:
        """Take in the lengths of a request that has ended by itself."""
        size = self._sizes.get(prompt.bit_length())
        if size is None:
            size = self._sizes[prompt.bit_length()] = _Size(self._most)
        size.ended += 1
        if size.ended % size.stride == 0 or not size.pairs:
            size.pairs.append(Pair(to_compute, prompt, output))

    def demand(self, now: float) -> Demand:
        """Return what comes from now on: the intervals since demand has changed last, as often as they fill the window.
        Of a prompt's tokens that part counts that the pairs had to compute."""
        self._go_to(now)
        whole = len(self._intervals) - 1 or 1  # the interval that has just begun would look like a lull
        intervals = list(islice(self._intervals, whole))
        outputs = {size: found.output for size, found in self._sizes.items()}
        mean = sum(outputs.values()) / len(outputs) if outputs else 0.0
        tokens = [float(one.tokens) for one in intervals]
        to_decode = [sum([n * outputs.get(size, mean) for size, (n, _) in one.sizes.items()]) for one in intervals]
        begin = steady_from((tokens, to_decode))
        intervals, tokens = intervals[begin:], tokens[begin:]
        pairs = self._sample(intervals)
        prompt = sum([pair.prompt for pair in pairs])
        part = sum([pair.to_compute for pair in pairs]) / prompt if prompt else 1.0
        requests, turns = [one.requests for one in intervals], -(-self._bins // len(intervals))
        tokens = [part * count for count in tokens]
        return Demand(
            self._seconds, (requests * turns)[: self._bins], (tokens * turns)[: self._bins], pairs, sum(requests)
        )

    def new_sample(self, seconds: float) -> None:
        """Choose how many of those that end are kept from here on, from how many have ended in so many seconds."""
        for size in self._sizes.values():
            a_window = size.ended * self._bins * self._seconds / seconds
            size.stride, size.ended = max(1, int(a_window / self._most)), 0

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
