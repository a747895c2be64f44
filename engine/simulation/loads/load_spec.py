"""Loads as they are written on a command line: a recorded trace or a generator, and how it is scaled.

    TRACE                                     AzureLLMInferenceTrace_conv_2023.csv
    TRACE:key=value,...                       conversation_trace.jsonl:limit=3000,faster=2
    GENERATOR:key=value,...                   poisson:rate=5,input=512,output=128,seconds=600

Scaling keys go with every load and are applied in this order, wherever they stand: `limit`, `keep`, `copies`, `faster`,
`longer` (`scaling.py`). All keys are in `scripts/loads.py`, in the words that commands have for them.
"""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from ..workload import Workload
from . import scaling
from .generators import GENERATORS, lengths_of
from .lengths import Lengths
from .load_file import ReadBatch, read_load_file
from .spec_options import Options


def read_workload(text: str, read_batch: ReadBatch | None = None) -> Workload:
    """Return the workload that a text stands for; `read_batch` reads batch files, whose texts need a tokenizer.

    Raises:
        OSError: a file cannot be read.
        ValueError: the text means nothing, or the file is no trace; iterating may raise one as well, at what is wrong
            further down in a file.
    """
    name, options = _divided(text)
    make = GENERATORS.get(name)
    workload = read_load_file(_path(name, text), read_batch) if make is None else make(text, options, read_load_file)
    workload = _scaled(workload, options)
    options.check_all_taken()
    if make is not None and next(iter(workload.requests), None) is None:
        raise ValueError(f"load {text!r}: no request comes in that time: give more seconds or a higher rate.")
    return workload


def read_lengths(text: str) -> Lengths:
    """Return lengths alone, as generators take them: input=...,output=... or lengths=TRACE.

    Raises:
        OSError: the trace cannot be read.
        ValueError: the text means nothing, or the file is no trace.
    """
    options = Options(text, text)
    lengths = lengths_of(options, read_load_file)
    options.check_all_taken()
    return lengths


def _divided(text: str) -> tuple[str, Options]:
    """Divide a load into its name or path, and its options."""
    name, colon, rest = text.partition(":")
    if name not in GENERATORS:
        # A path may have colons of its own; options have an equals sign.
        name, colon, rest = text.rpartition(":")
        if not colon or "=" not in rest or Path(text).exists():
            name, rest = text, ""
    return name, Options(text, rest)


def _path(name: str, text: str) -> str:
    """Return the path of a trace, after a look at whether a generator was meant."""
    if Path(name).exists() or (Path(name).suffix and name == text):
        return name
    close = get_close_matches(name, GENERATORS, 1)
    nearest = f"the nearest generator is {close[0]}" if close else f"generators are {', '.join(GENERATORS)}"
    raise ValueError(f"load {text!r}: there is no file {name!r}, and no generator of that name: {nearest}.")


def _scaled(workload: Workload, options: Options) -> Workload:
    scales: dict[str, Callable[[Workload], Workload]] = {
        "limit": lambda made: scaling.first(made, options.count("limit")),
        "keep": lambda made: scaling.thinned(made, options.number("keep", most=1.0)),
        "copies": lambda made: scaling.superimposed(made, options.count("copies")),
        "faster": lambda made: scaling.faster(made, options.number("faster")),
        "longer": lambda made: scaling.longer(made, options.number("longer")),
    }
    for key, scale in scales.items():
        if options.has(key):
            workload = scale(workload)
    return workload
