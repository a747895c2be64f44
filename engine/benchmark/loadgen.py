"""A run of MLPerf's LoadGen on an engine: the real LoadGen issues, stamps and judges; the engine answers in process.

Its settings and limits are `loadgen_settings.py`, what it has logged of the run `loadgen_log.py`. A run is valid where
LoadGen says VALID, nothing failed, and nothing was shortened. It is no submission: MLPerf's data sets, models and
accuracy runs are not part of it.
"""

import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..api.client import EngineClient
from ..host.extras import need
from ..simulation.loads.lengths import Lengths
from ..simulation.workload import WorkRequest, checked
from .driver import Driven, quick_switches
from .loadgen_log import PREFIX, LoadGenLog, check_in_force, read_log
from .loadgen_settings import EXTRA, Scenario, limits_of
from .loadgen_sut import SystemUnderTest

_LEAST_OUTPUT = 2  # tokens: LoadGen divides by one less


class LoadGenRun(NamedTuple):
    """What became of a run."""

    driven: Driven
    log: LoadGenLog


def samples_of(lengths: Lengths, count: int, longest: int, seed: int = 0) -> tuple[WorkRequest, ...]:
    """Draw the lengths of a data set's samples; prompt and answer may have `longest` tokens together.

    Raises:
        ValueError: a sample does not fit, or has an answer of fewer than 2 tokens.
    """
    drawn = lengths.draw(np.random.default_rng(seed), count).tolist()
    if any(output < _LEAST_OUTPUT for _, output in drawn):
        raise ValueError(f"LoadGen measures times between tokens: answers need {_LEAST_OUTPUT} tokens or more.")
    works = (WorkRequest(prompt, output, 0.0) for prompt, output in drawn)
    return tuple(checked(works, "the data set", longest))


def run_loadgen(
    client: EngineClient,
    settings: Any,
    scenario: Scenario,
    samples: Sequence[WorkRequest],
    folder: Path,
    accepted: Mapping[int, float],
) -> LoadGenRun:
    """Run LoadGen's test on an engine.

    The test has a thread of its own, since nothing can end it early: after Ctrl-C or a failure it is left alone, and
    the process ends without the exit handlers of LoadGen's library, which crash while a test is under way.

    Args:
        client: the engine's.
        settings: LoadGen's `TestSettings`, as the run is to be.
        scenario: that of the settings.
        samples: of the data set, as many as the settings say.
        folder: where LoadGen puts its logs; it is there.
        accepted: by the engine's id of a request, when it was taken in; an observer fills it meanwhile.

    Raises:
        ValueError: LoadGen was held to other limits than the settings say.
        EngineError: the engine has ended.
    """
    loadgen = need("mlperf_loadgen", EXTRA, "The preset mlperf")
    under_test = SystemUnderTest(loadgen, client, samples, accepted)
    test = threading.Thread(target=_test, args=(loadgen, under_test, settings, len(samples), folder), daemon=True)
    try:
        with quick_switches():
            test.start()
            under_test.over.wait()
        if under_test.failure is not None:
            raise under_test.failure
    except BaseException as error:
        atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    test.join()
    log = read_log(folder)
    check_in_force(log, scenario, limits_of(settings))
    return LoadGenRun(under_test.finish(), log)


def _test(loadgen: Any, under_test: SystemUnderTest, settings: Any, samples: int, folder: Path) -> None:
    sut = loadgen.ConstructSUT(under_test.issue, under_test.flush)
    library = loadgen.ConstructQSL(samples, samples, under_test.load, under_test.unload)
    nothing = str(folder / "audit.config")  # which would change the settings: none is there
    loadgen.StartTestWithLogSettings(sut, library, settings, _log_settings(loadgen, folder), nothing)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)
    under_test.over.set()


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _log_settings(loadgen: Any, folder: Path) -> Any:
    output, settings = loadgen.LogOutputSettings(), loadgen.LogSettings()
    output.outdir, output.prefix = str(folder), PREFIX
    output.copy_summary_to_stdout = False
    settings.log_output, settings.enable_trace = output, False
    return settings
