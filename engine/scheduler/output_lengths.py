"""How long outputs are: the mean over the last requests that finished by themselves."""

from collections import deque

# So many requests count; a change in what is asked shows after as many.
RECENT = 1000


class OutputLengths:
    """The lengths of the latest outputs, in tokens. All takes O(1)."""

    def __init__(self) -> None:
        self._recent, self._sum = deque[int](), 0

    def add(self, tokens: int) -> None:
        """Take in the length of an output that is complete."""
        self._recent.append(tokens)
        self._sum += tokens
        if len(self._recent) > RECENT:
            self._sum -= self._recent.popleft()

    def expected(self, most: int) -> float:
        """Return how many tokens a request still makes, which may make `most`: the mean of all outputs, or all that it
        may where none is known. How many it has made says little about how many will follow."""
        return min(most, self._sum / len(self._recent)) if self._recent else most
