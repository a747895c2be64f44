"""Batch runs: a file of requests in, a file of results out, written as requests finish; a run that ended early goes on.

Invariants: every line that is not blank becomes exactly one output line, a result or an error, whatever happened in
between and however often the run was started; a result is written once and never computed again (`journal.py`
says how much a power loss can cost); runs with different models, inputs or sampling never share an output
(`identity.py`). A bounded number of requests is in memory, so a file may be larger than that. Output lines come
in the order in which requests finish, Parquet rows in that of the input. It does not load models.
"""

import errno
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...models.checkpoints.catalog import resolve_model
from ...models.text.chat_messages import plain
from ..api.sampling_params import SamplingParams, check_params
from ..errors import BatchStopped, EngineError
from ..host.progress import Progress
from . import parquet
from .files import replacing
from .identity import Identity
from .journal import Journal, Kept
from .lateness import OnLate, check_late
from .paths import Output
from .runner import BatchRun
from .source import InputError, Source, Survey
from .summary import BatchResult

if TYPE_CHECKING:
    from ..api.base import BaseLLM

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
    llm: "BaseLLM",
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path,
    defaults: SamplingParams | None = None,
    engine: Mapping[str, Any] | None = None,
    restart: bool = False,
    retry_errors: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    window: int | None = None,
    keep: int = 0,
    progress: bool = False,
    deadline: float | None = None,
    on_late: OnLate = "say",
) -> BatchResult:
    """Run every line of `source` that has no line in `target` yet, and write one for each as it finishes.

    The arguments and exceptions are those of `Batch` and of `Batch.run`.
    """
    check_late(deadline, on_late)
    with Batch(
        source,
        target,
        model=model,
        defaults=defaults,
        engine=engine,
        restart=restart,
        retry_errors=retry_errors,
        chat_template_kwargs=chat_template_kwargs,
    ) as batch:
        return batch.run(llm, window=window, keep=keep, progress=progress, deadline=deadline, on_late=on_late)


class Batch:
    """A batch run on disk: the input surveyed, the output locked, compared with the run and mended; no engine yet."""

    def __init__(
        self,
        source: str | Path,
        target: str | Path,
        *,
        model: str | Path,
        defaults: SamplingParams | None = None,
        engine: Mapping[str, Any] | None = None,
        restart: bool = False,
        retry_errors: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Find out what remains to be done. Close the batch afterwards, or use it as a context manager.

        Args:
            source: a file of JSON lines, or of Parquet if its name ends in .parquet or .pq; "-" is stdin, which cannot
                be resumed.
            target: the file of results, in the format that its name says. What the same run has finished before is
                kept. `TARGET.run` beside it remembers which run it is, and Parquet's results are in `TARGET.jsonl`
                until the last is there. In both paths "~" is the user's home.
            model: what the engine was, or will be, made of: a name or a path, as `LLM` takes it.
            defaults: sampling parameters for what a line does not set; None: `SamplingParams()`.
            engine: what else decides the results and must not change, such as {"dtype": "bfloat16"}.
            restart: remove all results from the output and start over.
            retry_errors: run lines again that have an error in the output.
            chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}, for the
                conversations of all lines; a line's own go before them. They decide the results and must not change.

        Raises:
            ValueError: the input cannot be read, is empty or has a custom_id twice; there is no such model; the output
                cannot be written, is in use, holds results of another run, or would overwrite input or model.
            BatchStopped: the output's disk is full.
        """
        self._source, self._output = Source.of(source), Output(target)
        self._model = str(model)
        self._defaults = check_params(SamplingParams() if defaults is None else defaults).clone()
        self._variables = plain(chat_template_kwargs or {}, "chat_template_kwargs")
        self._kept = Kept(bytearray())
        self._survey: Survey | None = None
        self._result: BatchResult | None = None
        self._is_open = self._is_new = self._is_done = False
        self._output.check()
        try:
            checkpoint = resolve_model(model)
            self._output.refuse_to_overwrite(self._source.path, checkpoint)
            self._journal = Journal(self._output.journal)
            self._is_open = True
            variables = {"chat_template_kwargs": self._variables} if self._variables else {}
            self._prepare(checkpoint, {**(engine or {}), **variables}, restart, retry_errors)
        except OSError as error:
            self.close()
            if error.errno in _FULL:
                raise self._stopped(error) from error
            raise ValueError(f"{self._place(error)} cannot be used: {error.strerror or error}.") from error
        except BaseException:
            self.close()
            raise

    @property
    def total(self) -> int | None:
        """Return the number of requests in the input; None for stdin, where it is unknown."""
        return None if self._survey is None else self._survey.requests

    @property
    def remaining(self) -> int | None:
        """Return how many requests have no output line yet; None if unknown. If 0, `finish` needs no engine."""
        return None if self.total is None else self.total - self._kept.lines

    def run(
        self,
        llm: "BaseLLM",
        *,
        window: int | None = None,
        keep: int = 0,
        progress: bool = False,
        deadline: float | None = None,
        on_late: OnLate = "say",
    ) -> BatchResult:
        """Run the requests that have no output line yet. They use what interactive requests leave of the engine.

        It blocks: beside coroutines, `await asyncio.to_thread(batch.run, llm)`.

        Args:
            llm: the engine, an `LLM` or an `AsyncLLM`, which may serve others as well.
            window: requests that may be in the engine at once; None: four times its slots, so that slots do not run
                empty.
            keep: how many of the first results to return whole, in `BatchResult.kept`.
            progress: show on stderr how many lines are done.
            deadline: seconds from now by which the last line is wanted: of several files the earliest goes first. When
                the run is predicted to miss it, it says so on stderr, once, and goes on.
            on_late: what to do then besides: "say", nothing; "promote": run the rest as interactive requests.

        Raises:
            ValueError: the batch was closed or run before; stdin was empty; or a deadline that is no number above 0.
            BatchStopped: the disk is full or fails, the input changed or the output was moved meanwhile, or the engine
                is closed or has failed.
            KeyboardInterrupt: Ctrl-C. Any exception aborts the requests that are still in the engine, and keeps what is
                written.
        """
        check_late(deadline, on_late)
        if self._result is not None or not self._is_open:
            raise ValueError("This Batch was closed or run before: make a new one, which goes on from what is written.")
        if self.remaining == 0:
            return self.finish()
        files = self._source, self._survey, self._journal, self._kept
        start = BatchRun(llm, *files, self._model, self._defaults, self._variables, keep)
        self._result = start.result
        window = window or 4 * llm.config.max_num_seqs * len(llm.config.topology.meshes)
        try:
            with Progress("batch", self.total, "lines", shown=progress, done=self._kept.lines) as line:
                start.run(window, line, deadline, on_late)
            if self._survey is None and not start.result.finished:
                raise ValueError("The input '-' is empty: write one JSON request on each line.")
            self._conclude()
        except OSError as error:
            raise self._stopped(error) from error
        except (EngineError, InputError) as error:
            raise BatchStopped(f"{error} {self._standing()}") from error
        return start.result

    def finish(self) -> BatchResult:
        """Conclude a batch of which nothing remains to be run, without an engine. Raises BatchStopped as `run` does."""
        kept = self._kept
        try:
            self._conclude()
        except OSError as error:
            raise self._stopped(error) from error
        return BatchResult(kept.succeeded, kept.failed, kept.lines, kept.mended, kept.retried)

    def close(self) -> None:
        """Put on disk what was written and unlock the output. Calling it again does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        is_void = self._journal.created and self._journal.is_empty  # a run that never began leaves nothing behind
        with suppress(OSError, BatchStopped):  # where it matters, `_conclude` has done it
            self._journal.sync()
        if is_void and self._is_new:  # before the lock is gone: after it, this may be another run's
            with suppress(OSError):  # a directory of that name is why it never began
                self._output.sidecar.unlink()
        self._journal.close(remove=is_void or (self._output.is_parquet and self._is_done))

    def __enter__(self) -> "Batch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the batch; an exception of Ctrl-C, even from before the run, gets a note that says what is written."""
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._standing())
        self.close()

    def _prepare(self, checkpoint: Path, engine: dict[str, Any], restart: bool, retry_errors: bool) -> None:
        survey = self._survey = None if self._source.path is None else self._source.survey()
        identity = Identity.of(checkpoint, "stdin" if survey is None else survey.digest, self._defaults, engine)
        if restart:
            self._journal.clear()
            if self._output.is_parquet:
                self._output.path.unlink(missing_ok=True)
        # An empty journal beside it is that of a start that was killed before it looked.
        is_finished_parquet = self._output.is_parquet and self._journal.is_empty and self._output.path.exists()
        last_line = 0 if survey is None else survey.last_line
        if self._journal.is_empty and not is_finished_parquet:
            self._kept, self._is_new = Kept(bytearray(last_line + 1)), True
            identity.save(self._output.sidecar)
            return
        self._refuse_another(identity)
        if is_finished_parquet:
            kept = Kept(bytearray(), *parquet.count_results(self._output.path))
            if kept.lines == self.total and not retry_errors:
                self._kept, self._is_done = kept, True
                return
            self._journal.rewrite(parquet.read_results(self._output.path))
        self._kept = self._journal.recover(last_line, retry_errors=retry_errors)

    def _refuse_another(self, identity: Identity) -> None:
        """Refuse to go on with what another run has written."""
        if self._survey is None:
            raise ValueError(
                f"{self._output} holds results, and stdin cannot be read from its beginning again: put the requests "
                "into a file, give another output, or start over with --restart."
            )
        try:
            differences = identity.differences(self._output.sidecar)
        except ValueError as error:
            raise ValueError(
                f"{self._output} exists and cannot be resumed, because {error}: give another output, or overwrite it "
                "with --restart."
            ) from None
        if differences:
            raise ValueError(
                f"{self._output} holds results of another run ({', '.join(differences)}): go on with the same as then, "
                "give another output, or start over with --restart."
            )

    def _conclude(self) -> None:
        """Put the written results on disk, and make the Parquet file of them if the output is one."""
        self._journal.sync()
        if self._output.is_parquet and not self._is_done:
            with replacing(self._output.path) as scratch:
                parquet.write_results(scratch, self._journal.results())
        self._is_done = True

    def _standing(self) -> str:
        """Describe how far the run has come and how to go on with it."""
        # The file's own lines: an interruption may come between the writing of one and the counting.
        count = self._kept.lines if self._result is None else self._journal.count_lines()
        place = f"results are in {self._output.shown_journal}"
        if self._source.path is None:
            return f"{count} {place}; a run from stdin cannot be resumed."
        of = f"{count} of {self._survey.requests}" if self._survey is not None else f"{count}"
        return f"{of} {place}; the same command goes on from there."

    def _stopped(self, error: OSError) -> BatchStopped:
        why = f"{self._place(error)} failed: {error.strerror or error}."
        if error.errno in _FULL:
            why = f"There is no room for more of {self._output} ({error.strerror}): make some."
        return BatchStopped(f"{why} {self._standing()}")

    def _place(self, error: OSError) -> str:
        """Return the name of the file that an error is about; of a renaming the new name."""
        return str(error.filename2 or error.filename or self._output)
