"""The demand of the last minute, counted as it arrives: requests and prompt tokens by interval, and pairs of lengths.

Bounded whatever comes: a fixed number of intervals, and of the requests that end one in so many, so that the pairs kept
span about a window. Each call is O(1), but for the intervals in which nothing came. No clock: callers say when.
"""

from collections import deque

from .observations import Demand, Pair

_FEW = 16  # pairs that are kept, however old they are


class DemandWindow:
    """What arrived and ended in the latest `bins` intervals of `seconds`."""

    def __init__(self, bins: int, seconds: float, pairs: int):
        """Begin with nothing; of requests that end, `pairs` are kept."""
        self._seconds, self._bins, self._most = seconds, bins, pairs
        self._requests, self._tokens = deque[int](maxlen=bins), deque[int](maxlen=bins)
        self._last = 0  # the interval that the newest entries are of, counted from time 0
        self._pairs = deque[tuple[float, Pair]](maxlen=pairs)  # with when they ended
        self._ended = 0  # requests, since the sample was looked at
        self._stride = 1  # one in so many is kept

    def arrived(self, t: float, prompt_tokens: int) -> None:
        """Count an interactive request."""
        self._go_to(t)
        self._requests[-1] += 1
        self._tokens[-1] += prompt_tokens

    def ended(self, t: float, to_compute: int, prompt: int, output: int) -> None:
        """Take in the lengths of a request that has ended by itself."""
        self._ended += 1
        if self._ended % self._stride == 0 or not self._pairs:
            self._pairs.append((t, Pair(to_compute, prompt, output)))

    def demand(self, now: float) -> Demand:
        """Return the window that ends now; of a prompt's tokens that part counts that the pairs had to compute."""
        self._go_to(now)
        # Lengths may have changed with what is asked: those of the second half of the window say more.
        while len(self._pairs) > _FEW and self._pairs[0][0] < now - self._bins * self._seconds / 2:
            self._pairs.popleft()
        pairs = [pair for _, pair in self._pairs]
        prompt = sum([pair.prompt for pair in pairs])
        part = sum([pair.to_compute for pair in pairs]) / prompt if prompt else 1.0
        whole = len(self._requests) - 1 or 1  # the interval that has just begun would look like a lull
        requests, tokens = list(self._requests)[:whole], list(self._tokens)[:whole]
        return Demand(self._seconds, requests, [part * count for count in tokens], pairs)

    def new_sample(self, seconds: float) -> None:
        """Choose how many of those that end are kept from here on, from how many have ended in so many seconds."""
        a_window = self._ended * self._bins * self._seconds / seconds
        self._stride, self._ended = max(1, int(a_window / self._most)), 0

    def _go_to(self, t: float) -> None:
        interval = int(t / self._seconds)
        if not self._requests:
            self._last = interval - 1
        for _ in range(min(interval - self._last, self._bins)):
            self._requests.append(0)
            self._tokens.append(0)
        self._last = max(self._last, interval)
