"""Batch runs: a file of requests in, a file of results out, written as requests finish.

Invariants: every line that is not blank becomes exactly one output line, a result or an error, and a line is written
whole, unless the disk fills up; at most `window` requests are in the engine at once, so a file may be larger than
memory. Outputs come in the order in which requests finish: `custom_id` says which is which. An interrupted run aborts
its own requests and keeps what it has written. It does not resume, and it does not load models.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from .batch_lines import BatchLineError, BatchRequest, encode_line, error_line, parse_line, success_line
from .metrics import RECENT
from .outputs import RequestOutput
from .request import Timeline
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM


@dataclass
class BatchResult:
    """What a run has done so far. Counts are lines and tokens; `seconds` is wall time.

    `timelines` are of the latest successes, 4096 at most. `kept` holds the first lines of the input that succeeded, in
    input order, as many as the caller asked for.
    """

    succeeded: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    timelines: deque[Timeline] = field(default_factory=lambda: deque(maxlen=RECENT))
    kept: list[tuple[BatchRequest, RequestOutput]] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Output lines written."""
        return self.succeeded + self.failed

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


def check_files(source: str | Path, target: str | Path) -> int:
    """Count the input's lines that are not blank, after checking that the output could be written.

    Cheap, and without side effects: meant to be called before a model is loaded.

    Raises:
        ValueError: the input cannot be read or has no lines, or the output cannot be written.
    """
    source, target = Path(source), Path(target)
    try:
        if source.exists() and not source.is_file():
            raise ValueError(f"The input {source} is not a regular file: give a file of JSON lines.")
        with source.open("rb") as lines:
            count = sum(1 for line in lines if line.strip())
    except OSError as error:
        raise ValueError(f"The input {source} cannot be read: {error.strerror}.") from None
    if not count:
        raise ValueError(f"The input {source} is empty: put one JSON request on each line.")
    _check_output(source, target)
    return count


def _check_output(source: Path, target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"The output {target} is a directory: give a file name.")
    if not target.parent.is_dir():
        raise ValueError(f"The output's directory {target.parent} does not exist: make it first.")
    if target.exists() and target.samefile(source):
        raise ValueError(f"The output {target} is the input file: give another name.")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"The output {target} cannot be written: permission denied.")


def run_batch(
    llm: "LLM",
    source: str | Path,
    target: str | Path,
    *,
    model: str,
    defaults: SamplingParams,
    window: int | None = None,
    keep: int = 0,
    progress: bool = False,
) -> BatchResult:
    """Run every line of `source` and write a line to `target` for each, flushed as it finishes.

    Args:
        llm: the engine.
        source: JSON lines, read as they are needed.
        target: overwritten.
        model: the name that output lines give where the input line gives none.
        defaults: sampling of lines that do not say; a seed is shifted by the line's number.
        window: requests that may be in the engine at once; None: four times the slots of a mesh, which stay full then.
        keep: how many of the first lines to hand back whole.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: as `check_files`.
        OSError: the output could not be written.
        EngineError: the engine is closed or has failed.
        KeyboardInterrupt: Ctrl-C; a note on the exception says what is written. Any exception aborts the requests
            that are still in the engine, and keeps what is written.
    """
    total = check_files(source, target)
    with (
        Path(source).open("rb") as lines,
        Path(target).open("wb") as sink,
        tqdm(total=total, unit="req", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10) as bar,
    ):
        run = _Run(llm, sink, bar, model, defaults, keep)
        try:
            with closing(llm.as_completed(run.jobs(lines), window=window or 4 * llm.config.max_num_seqs)) as results:
                for index, output in results:
                    run.finish(index, output)
        except KeyboardInterrupt as stop:
            stop.add_note(f"{run.result.finished} of {total} results are in {target}.")
            raise
        return run.result


class _Run:
    """One batch run: the requests that are in the engine, and the tally of those that left it."""

    def __init__(
        self, llm: "LLM", sink: IO[bytes], bar: "tqdm[NoReturn]", model: str, defaults: SamplingParams, keep: int
    ) -> None:
        self.result = BatchResult()
        self._llm, self._sink, self._bar = llm, sink, bar
        self._model, self._defaults, self._keep = model, defaults, keep
        self._start = time.monotonic()
        self._in_engine: dict[int, BatchRequest] = {}
        self._first_line: dict[str, int] = {}

    def jobs(self, lines: IO[bytes]) -> Iterator[tuple[list[int], SamplingParams]]:
        """Prompts that the engine will take; what it would not is written off on the way."""
        index = 0
        for number, line in _numbered(lines):
            try:
                request = parse_line(line, number, self._defaults)
                prompt = self._check(request)
            except BatchLineError as error:
                self._write_error(error)
                continue
            self._in_engine[index] = request
            yield prompt, request.sampling_params
            index += 1

    def finish(self, index: int, output: RequestOutput) -> None:
        """Write the line of a request that has ended."""
        request = self._in_engine.pop(index)
        if output.error is not None:
            self._write_error(BatchLineError("request_failed", request.line, request.custom_id, output.error))
            return
        self._write(success_line(request, output, model=self._model, created=int(time.time())))
        self._tally(request, output)

    def _check(self, request: BatchRequest) -> list[int]:
        """The prompt's token ids, once the engine is sure to take the request.

        Results are told apart by their custom ids, so each may be used once.
        """
        first = self._first_line.setdefault(request.custom_id, request.line)
        if first != request.line:
            message = f"custom_id={request.custom_id!r} is already that of line {first}: give each line its own."
            raise BatchLineError("duplicate_custom_id", request.line, request.custom_id, message)
        try:
            prompt = request.prompt if request.messages is None else self._llm.chat_prompt(request.messages)
            assert prompt is not None  # a request has the one or the other
            self._llm.check_sampling_params(request.sampling_params)
            return self._llm.check_prompt(prompt).token_ids
        except ValueError as error:
            raise BatchLineError("invalid_request", request.line, request.custom_id, str(error)) from None

    def _tally(self, request: BatchRequest, output: RequestOutput) -> None:
        result = self.result
        result.succeeded += 1
        result.prompt_tokens += len(output.prompt_token_ids)
        result.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        result.timelines.append(output.timeline)
        result.kept = sorted([*result.kept, (request, output)], key=lambda kept: kept[0].line)[: self._keep]
        self._show_progress()

    def _write_error(self, error: BatchLineError) -> None:
        self._write(error_line(error))
        self.result.failed += 1
        self._show_progress()

    def _write(self, fields: dict[str, Any]) -> None:
        self._sink.write(encode_line(fields))
        self._sink.flush()

    def _show_progress(self) -> None:
        self.result.seconds = time.monotonic() - self._start
        rate = self.result.tokens_per_second
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, errors: {self.result.failed}", refresh=False)
        self._bar.update()


def _numbered(lines: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1; a byte order mark is not part of the first."""
    for number, line in enumerate(lines, start=1):
        stripped = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if stripped:
            yield number, stripped
