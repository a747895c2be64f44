"""One start of a batch run, from open files to the last result: what goes into the engine and what comes out of it.

Invariants: a request leaves the engine before its line is written and is counted after; what an engine that closed or
failed gives back is not a result, and is not written. Not here: comparing the run with an earlier one, opening files.
"""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from ..api.outputs import RequestOutput
from ..api.sampling_params import SamplingParams
from ..host.progress import Progress
from .journal import Journal, Kept
from .lateness import EVERY, OnLate, Running, Watch
from .line_fields import Line
from .order import LOOK_AHEAD, Prepared, arrange
from .request_lines import BatchLineError, BatchRequest, parse_line, with_variables
from .result_lines import encode_line, error_line, success_line
from .source import Source, Survey
from .summary import BatchResult

if TYPE_CHECKING:
    from ...models.text.chat import ChatOptions
    from ..api.base import BaseLLM
    from ..api.job import Job


class BatchRun:
    """One start of a batch run: the requests that are in the engine, and counts of those that left it."""

    def __init__(
        self,
        llm: "BaseLLM",
        source: Source,
        survey: Survey | None,
        journal: Journal,
        kept: Kept,
        model: str,
        defaults: SamplingParams,
        variables: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Prepare the start; nothing is read or run yet.

        Args:
            llm: the engine.
            source: the input.
            survey: what is known of the input; None for stdin.
            journal: where output lines are written.
            kept: what the journal holds already.
            model: the model's name in output lines of requests that do not name one.
            defaults: sampling parameters for what a line does not set.
            variables: of the chat template, where lines do not say otherwise.
            keep: how many of the first results to keep whole in `result`.
        """
        self.result = BatchResult(kept.succeeded, kept.failed, kept.lines, kept.mended, kept.retried)
        self._llm, self._source, self._survey, self._journal, self._done = llm, source, survey, journal, kept.done
        self._model, self._defaults, self._variables, self._keep = model, defaults, variables, keep
        self._in_engine: dict[int, BatchRequest] = {}
        self._names: set[int] = set()
        self._shown = self.result.finished  # as far as the progress line has come

    def run(self, window: int, progress: Progress, deadline: float | None, on_late: OnLate) -> None:
        """Run the requests that have no output line yet, with at most `window` of them in the engine, by a deadline.

        Raises:
            OSError: a line could not be written.
            InputError: the input changed, or can no longer be read.
            EngineError: the engine is closed or has failed.
        """
        start, clock = time.monotonic(), self._llm.clock
        run = self._llm.run_jobs(self._jobs(), window=window, deadline=deadline)
        watch = None if deadline is None else self._watch(run, clock(), deadline, on_late)
        results = run.outputs(every=None if watch is None else EVERY)
        try:
            for result in results:
                if result is not None:
                    index, output = result
                    self._finish(self._in_engine.pop(index), output)
                self.result.seconds = time.monotonic() - start
                if watch is not None:
                    watch.look(clock())
                self._show(progress)
        finally:
            results.close()
            self.result.seconds = time.monotonic() - start
            if watch is not None:
                watch.end(clock())
            self._show(progress)

    def _watch(self, run: Running, start: float, deadline: float, on_late: OnLate) -> Watch:
        total = None if self._survey is None else self._survey.requests
        return Watch(run, self.result, total, start + deadline, start, on_late)

    def _jobs(self) -> Iterator["Job | None"]:
        """Yield what goes into the engine; None where stdin has nothing yet and results come first."""
        index = 0
        for prepared in self._in_order():
            if prepared is None:
                yield None
                continue
            self._in_engine[index] = prepared.request
            index += 1
            yield prepared.job

    def _in_order(self) -> Iterator[Prepared | None]:
        if self._survey is None:  # what is behind on stdin may not have been written yet
            return self._as_they_come()
        return arrange(self._remaining(self._survey), page_size=self._llm.config.page_size, ahead=LOOK_AHEAD)

    def _as_they_come(self) -> Iterator[Prepared | None]:
        for numbered in self._source.lines_as_they_come(may_wait=lambda: not self._in_engine):
            if numbered is None:
                yield None
            elif prepared := self._take(*numbered):
                yield prepared

    def _remaining(self, survey: Survey) -> Iterator[Prepared]:
        for number, line in self._source.lines(survey):
            if not self._done[number] and (prepared := self._take(number, line)):
                yield prepared

    def _take(self, number: int, line: Line) -> Prepared | None:
        """Prepare a line's request; if the engine would refuse it, write its error line and return None."""
        try:
            return self._prepare(line, number, self._llm.clock())
        except BatchLineError as error:
            self._write_error(error)
            return None

    def _prepare(self, line: Line, number: int, arrival: float) -> Prepared:
        request = parse_line(line, number, self._defaults)
        self._check_name(request)
        try:
            return Prepared.of(request, self._check(request, arrival))
        except ValueError as error:
            raise BatchLineError("invalid_request", number, request.custom_id, str(error)) from None

    def _check(self, request: BatchRequest, arrival: float) -> "Job":
        if request.messages is None:
            assert request.prompt is not None  # a request has the one or the other
            return self._llm.check_request(request.prompt, request.sampling_params, arrival)
        options = cast("ChatOptions", with_variables(request.rendering, self._variables))
        params = request.sampling_params
        return self._llm.check_chat(
            request.messages, params, request.tools, arrival=arrival, options=options, tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            # The line's own, whenever it runs: `params` have its seed.
            name=f"{self._model}:{request.line}:{request.custom_id}:{params.seed}",
        )  # fmt: skip

    def _check_name(self, request: BatchRequest) -> None:
        """Refuse a custom_id of stdin that was used before; those of a file were compared before the run began."""
        if self._survey is not None:
            return
        name = hash(request.custom_id)
        if name in self._names:
            message = f"custom_id={request.custom_id!r} is already that of an earlier line: give each line its own."
            raise BatchLineError("duplicate_custom_id", request.line, None, message)
        self._names.add(name)

    def _finish(self, request: BatchRequest, output: RequestOutput) -> None:
        """Write the line of a request that has ended, and count it."""
        reasons = {completion.finish_reason for completion in output.outputs}
        if reasons & {"error", "abort"}:
            self._llm.check_health()  # an engine that ended takes its requests along, which say nothing of the requests
            why = output.error or "the request was aborted."
            self._write_error(BatchLineError("request_failed", request.line, request.custom_id, why))
            return
        if "deadline" in reasons:  # OpenAI's code for what its window has left undone
            why = "the request did not end by its deadline."
            self._write_error(BatchLineError("batch_expired", request.line, request.custom_id, why))
            return
        # The engine's own names of requests begin anew with every engine.
        line = success_line(request, output, model=self._model, created=int(time.time()), unique=uuid4().hex)
        self._write(line)
        self.result.add(request, output, self._keep)

    def _write_error(self, error: BatchLineError) -> None:
        self._write(error_line(error))
        self.result.failed += 1

    def _write(self, fields: dict[str, Any]) -> None:
        self._journal.append(encode_line(fields))

    def _show(self, progress: Progress) -> None:
        said = f"{self.result.tokens_per_second:.0f} tokens/s, {self.result.failed:,} with an error"
        if self.result.predicted_late is not None:
            said += ", late"
        if self.result.promoted:
            said += f", {self.result.promoted:,} promoted"
        progress.advance(self.result.finished - self._shown, said)
        self._shown = self.result.finished
