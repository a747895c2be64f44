"""The arguments that several commands share, and what they turn into; `sampling_arguments.py` has those of answers.

No JAX until `load_llm` is called.
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.batch.files import is_inside, is_same, real_path
from twinmesh.engine.chat.parser_names import REASONING_PARSERS, TOOL_CALL_PARSERS
from twinmesh.engine.config import ACTIVATIONS, DTYPES, LOGPROBS_MODES, METHODS, QUANTIZATIONS, check_seconds
from twinmesh.engine.kv_dtypes import parse_kv_dtypes
from twinmesh.engine.options import EngineOptions, Option, documentation, signature
from twinmesh.engine.protocol.service import SLO, is_positive, read_slo
from twinmesh.engine.scheduler.policy import policy_named
from twinmesh.engine.topology import AUTO, Topology, TopologyError
from twinmesh.models.checkpoints.catalog import CATALOG, cache_directory

if TYPE_CHECKING:
    from twinmesh.engine.api.llm import LLM
    from twinmesh.engine.startup.one_request import OneRequest
    from twinmesh.models.checkpoints.base import Checkpoint


_LAST_PORT = 65535
# The values that an option may have, where they are few.
_CHOICES: Mapping[str, Sequence[str]] = {
    "dtype": ("auto", *DTYPES),
    "quantization": (*QUANTIZATIONS, *METHODS),
    "activations": ACTIVATIONS,
    "logprobs_mode": LOGPROBS_MODES,
    "tool_call_parser": TOOL_CALL_PARSERS,
    "reasoning_parser": REASONING_PARSERS,
}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model runs, and on what: an argument for each of `EngineOptions` that has a flag."""
    group = parser.add_argument_group("model and devices")
    for name, option in documentation().items():
        if option.flag is not None:
            _add_option(group, name, option, option.full_doc)


def given_engine_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags of `add_engine_arguments` whose options are not as they would be if nobody named them, by the
    option's name."""
    defaults = signature().parameters
    return {
        name: _flag(name, option)
        for name, option in documentation().items()
        if option.flag is not None and getattr(args, name) != defaults[name].default
    }


def add_metrics_port(parser: argparse.ArgumentParser) -> None:
    """Declare `--metrics-port`, for `metrics_port`."""
    parser.add_argument(
        "--metrics-port",
        metavar="N",
        type=_port,
        help="serve the engine's figures for Prometheus at http://127.0.0.1:N/metrics while it runs",
    )


@contextmanager
def metrics_port(args: argparse.Namespace) -> "Iterator[Callable[[LLM], None]]":
    """Listen on the port that was asked for, before anything is loaded; yield what shows an engine's figures there. It
    does nothing where none was.

    Raises:
        ValueError: the port cannot be used, or prometheus-client is not installed.
    """
    if args.metrics_port is None:
        yield lambda llm: None
        return
    from twinmesh.engine.metrics.prometheus import MetricsServer

    with MetricsServer(args.metrics_port) as server:
        yield lambda llm: server.show(llm.engine.core.metrics)


def add_simulated_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Declare an argument for each of these options, for an engine that never starts."""
    group = parser.add_argument_group("the engine")
    for name in names:
        _add_option(group, name, documentation()[name], documentation()[name].doc)


def _add_option(group: argparse._ArgumentGroup, name: str, option: Option, doc: str) -> None:
    flag = _flag(name, option)
    parameter = signature().parameters[name]
    if parameter.annotation is bool:
        group.add_argument(
            flag,
            dest=name,
            action="store_false" if parameter.default else "store_true",
            help=option.flag_doc or doc,
        )
        return
    is_required = parameter.default is parameter.empty
    shows_default = not is_required and parameter.default is not None
    group.add_argument(
        flag,
        required=is_required,
        default=None if is_required else parameter.default,
        type=_type_of(name, option),
        choices=_CHOICES.get(name),
        metavar=option.metavar or None,
        help=doc + (" (default: %(default)s)" if shows_default else ""),
    )


def _flag(name: str, option: Option) -> str:
    return option.flag or "--" + name.replace("_", "-")


def _type_of(name: str, option: Option) -> Callable[[str], object]:
    """Return the function that parses an option's value, chosen by the option's name or type."""
    if name == "topology":
        return _topology
    if name == "policy":
        return _policy
    if name == "kv_cache_dtype":
        return _kv_dtype
    if name == "decision_log":
        return written_path
    kinds: dict[object, Callable[[str], object]] = {
        int: whole_number(option.least),
        int | None: whole_number(option.least),
        float | None: fraction,
        float: _seconds,
        tuple[int, ...] | None: _whole_numbers,
    }
    return kinds.get(signature().parameters[name].annotation, not_empty)


def check_written(args: argparse.Namespace, written: Sequence[str], others: Iterable[tuple[Path, str]] = ()) -> None:
    """Refuse files to be written beside the results that could not be, or would overwrite the model or another file.

    Args:
        args: the arguments, `--model` among them.
        written: names of arguments, each with the path of a file that will be overwritten, or None.
        others: files that must not be overwritten, each with what it is.

    Raises:
        ValueError: two are the same file, one is a directory or in the model's directory, or a directory does not
            exist.
    """
    model = _model_path(args.model)
    taken = [(model, "the model file"), *others]
    for name in written:
        given, title = getattr(args, name), name.replace("_", " ")
        if given is None:
            continue
        path = Path(given)
        for other, what in taken:
            if is_same(path, other):
                raise ValueError(f"The {title} {given} is {what}: give another name.")
        if is_inside(path, model):
            raise ValueError(f"The {title} {given} is in the model's directory: give another place.")
        _refuse_directory(path, title)
        if not real_path(path).parent.is_dir():
            raise ValueError(f"The {title}'s directory {path.parent} does not exist: make it first.")
        if not os.access(path if path.exists() else real_path(path).parent, os.W_OK):
            raise ValueError(f"The {title} {given} cannot be written: give another place.")
        taken.append((path, f"the {title} file"))


def check_new(*paths: str | Path | None) -> None:
    """Refuse to write over what took a while to measure; None: nothing is written.

    Raises:
        ValueError: a file or a folder exists.
    """
    for path in paths:
        if path is not None and Path(path).exists():
            raise ValueError(f"{path} exists: give another name, or move it away.")


def given_files(args: argparse.Namespace) -> list[tuple[Path, str]]:
    """List the files that `--trace` and `--profile` may name, which nothing is to be written over."""
    given = [(args.trace, "the load"), (args.profile, "the profile")]
    return [(Path(name), what) for name, what in given if name is not None]


def _refuse_directory(path: Path, title: str) -> None:
    try:
        is_directory = path.is_dir()
    except OSError as error:  # as a name that is too long
        raise ValueError(f"The {title} {path} cannot be used: {error.strerror}.") from None
    if is_directory:
        raise ValueError(f"The {title} {path} is a directory: give a file name.")


def _model_path(name: str) -> Path:
    """Return where a model's file is, or would be; for a hub id, a path that most likely does not exist."""
    known = CATALOG.get(name)
    return Path(os.path.expanduser(name)) if known is None else known.cached(cache_directory())


def load_llm(
    args: argparse.Namespace, only: "Callable[[Checkpoint], OneRequest] | None" = None, *, slo: SLO | None = None
) -> "LLM":
    """Start the engine that was asked for, with loading and compiling shown on stderr; with `only` for one request.

    `slo` is what its answers are to keep to.
    """
    given = {name: getattr(args, name) for name, option in documentation().items() if option.flag is not None}
    options = EngineOptions(**given, slo=slo, progress=True)
    gc.disable()  # a tenth of the time: imports and programs are millions of objects, of which few ever go
    try:
        from twinmesh.engine.api.llm import LLM
        from twinmesh.engine.startup.build import start_engine

        return LLM.from_engine(start_engine(options, only), seed=options.seed)
    finally:
        gc.enable()


def positive(text: str) -> float:
    """Read an argument that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not is_positive(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def slo(text: str) -> SLO:
    """Read an SLO, as in ttft=1000ms,tpot=50ms,percentile=99."""
    try:
        return read_slo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def not_empty(text: str) -> str:
    """Return an argument that names something, and refuse an empty one, which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a name")
    return text


def read_path(text: str) -> str:
    """Read an argument that names a file: "~" is the user's home, also where no shell has put it in, as in --to=~/x."""
    return os.path.expanduser(not_empty(text))


def written_path(text: str) -> str:
    """Read an argument that names a file to be written."""
    if text == "-":
        raise argparse.ArgumentTypeError("'-' is no file: give a name, /dev/stdout, or ./- for a file of that name")
    return read_path(text)


def _seconds(text: str) -> float:
    """Read a number of seconds, 0 or more."""
    try:
        number = float(text)
        check_seconds("value", number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more") from None
    return number


def fraction(text: str) -> float:
    """Read an argument that is a part of something: above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return number


def whole_number(least: int) -> Callable[[str], int]:
    """Return a parser for arguments that are whole numbers, `least` or more."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
        return number

    return read


def _port(text: str) -> int:
    port = whole_number(1)(text)
    if port > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: they are 1 to {_LAST_PORT}")
    return port


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(1)(part) for part in text.split(","))


def _topology(text: str) -> Topology | str:
    if text == AUTO:
        return text
    try:
        return Topology.parse(text)
    except TopologyError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _kv_dtype(text: str) -> str:
    try:
        parse_kv_dtypes(text, "float32")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _policy(text: str) -> str:
    try:
        return policy_named(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
