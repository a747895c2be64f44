"""A batch file as a workload: all of its lines come at once, as batch work, and prompts that begin alike share blocks.

Lengths of prompts are counted by the tokenizer of a model: without one nobody can know them. How long answers will be
is not in a batch file, so each is as long as its line allows (`max_tokens`, or the run's default): an upper bound,
which real answers that stop by themselves stay below.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..api.sampling_params import SamplingParams
from ..protocol.service import Service
from ..simulation.workload import Workload, WorkRequest
from .request_lines import BatchRequest, parse_line

BLOCK = 16  # tokens; a divisor of every usual page
_BATCH = Service(is_batch=True)

type TokensOf = Callable[[BatchRequest], Sequence[int]]


def batch_workload(path: str | Path, tokens_of: TokensOf, defaults: SamplingParams | None = None) -> Workload:
    """Return the workload of a batch file.

    Args:
        path: JSON lines, as OpenAI's batch files or plain.
        tokens_of: the token ids of a line's prompt, by the model's tokenizer and chat template.
        defaults: sampling parameters for what a line does not set.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no request; iterating raises one at a line that cannot be run, with its number.
    """
    file = Path(path)
    workload = Workload(
        f"{file.name}, answers at their limit", _Lines(file, tokens_of, defaults or SamplingParams()), BLOCK
    )
    if next(iter(workload.requests), None) is None:
        raise ValueError(f"{path} is empty: give a batch file with at least one request.")
    return workload


@dataclass(frozen=True)
class _Lines:
    path: Path
    tokens_of: TokensOf
    defaults: SamplingParams

    def __iter__(self) -> Iterator[WorkRequest]:
        """Read the file; a line with n completions is n requests."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        request = parse_line(line, number, self.defaults)
                        yield from self._requests(request)
                    except ValueError as error:
                        where = "" if str(error).startswith("line ") else f"line {number}: "
                        raise ValueError(f"{self.path}, {where}{error}") from None

    def _requests(self, request: BatchRequest) -> Iterator[WorkRequest]:
        params = request.sampling_params
        if params.max_tokens is None:
            raise ValueError("it has no max_tokens, so nobody knows how long its answer may be: give one.")
        tokens = self.tokens_of(request)
        work = WorkRequest(len(tokens), params.max_tokens, 0.0, blocks=_blocks(tokens), service=_BATCH)
        for _ in range(params.n):
            yield work


def _blocks(tokens: Sequence[int]) -> tuple[int, ...]:
    """Return ids of the full blocks: 63 bits of a hash of all tokens up to a block's end."""
    data = memoryview(np.asarray(tokens, "<i4").tobytes())
    hashed, ids = blake2b(digest_size=8), list[int]()
    size = 4 * BLOCK
    for begin in range(0, len(data) - size + 1, size):
        hashed.update(data[begin : begin + size])
        ids.append(int.from_bytes(hashed.digest(), "little") >> 1)
    return tuple(ids)
