"""The arguments that several commands share, and what they turn into. No JAX until `load_llm` is called."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.files import is_inside, is_same, real_path
from twinmesh.engine.config import DTYPES
from twinmesh.engine.topology import Topology, TopologyError
from twinmesh.models.checkpoints.catalog import CATALOG, cache_directory

if TYPE_CHECKING:
    from twinmesh.engine.api.llm import LLM


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model runs, and on what."""
    group = parser.add_argument_group("model and devices")
    _add_model_arguments(group)
    _add_step_arguments(group)


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        required=True,
        type=not_empty,
        metavar="NAME|PATH|ID",
        help="a name that 'twinmesh fetch' knows, such as smollm2; a GGUF file; a directory in Hugging Face's format "
        "or written by 'twinmesh convert'; or an id of the Hugging Face hub: org/name, org/name@revision, "
        "org/name:file.gguf",
    )
    group.add_argument(
        "--topology",
        default="both=1",
        type=_topology,
        metavar="ROLES",
        help="device meshes and what each is for: both=1 shares one, prefill=1,decode=1 keeps prefill and decode "
        "apart, 1xtp2 is one mesh of two devices (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of weights, activations and KV; auto: what suits device and batch (default: %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=whole_number(1),
        metavar="N",
        help="longest prompt and completion together, in tokens; less takes less memory (default: the engine's choice)",
    )


def _add_step_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same tokens bit for bit, whatever else runs and however a request was scheduled; small steps are "
        "padded to full ones",
    )
    group.add_argument(
        "--decode-steps",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="most decode steps that run on the device before the host looks (default: %(default)s)",
    )
    group.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="compute every prompt in full, also where it starts as an earlier one did",
    )
    group.add_argument(
        "--decision-log",
        type=not_empty,
        metavar="FILE",
        help="write what the scheduler hears and decides, for 'twinmesh replay'; an existing file is overwritten",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, which: str) -> None:
    """How tokens are chosen and when to stop. `which` says, in the help, what the values hold for."""
    group = parser.add_argument_group("sampling", which)
    _add_choice_arguments(group, temperature)
    _add_length_arguments(group, max_tokens)


def _add_choice_arguments(group: argparse._ArgumentGroup, temperature: float) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 always takes the most likely token (default: %(default)g)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens that reach this probability together (default: %(default)g)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="draw from this many of the most likely tokens; 0 keeps all (default: %(default)s)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less likely than this times the most likely one (default: %(default)g)",
    )
    for name, neutral, what in (
        ("repetition", 1.0, "above 1 makes tokens of prompt and answer less likely to come again"),
        ("presence", 0.0, "subtracted from the logit of a token that was generated"),
        ("frequency", 0.0, "subtracted from the logit of a token for every time that it was generated"),
    ):
        group.add_argument(
            f"--{name}-penalty", type=float, default=neutral, metavar="X", help=f"{what} (default: %(default)g)"
        )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens again")


def _add_length_arguments(group: argparse._ArgumentGroup, max_tokens: int) -> None:
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="most tokens to generate (default: %(default)s)"
    )
    group.add_argument(
        "--min-tokens",
        type=int,
        default=0,
        metavar="N",
        help="the model's own end and --stop do not end the completion earlier (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the completion before this text; may be given several times",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on where the model says that it has finished")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling that was asked for; ValueError where a value is out of range."""
    return SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


def check_written(args: argparse.Namespace, written: Sequence[str], others: Iterable[tuple[Path, str]] = ()) -> None:
    """Refuse files to be written beside the results that could not be, or would overwrite the model or another file.

    Args:
        args: the arguments, `--model` among them.
        written: names of arguments, each with the path of a file that will be overwritten, or None.
        others: files that must not be, each with what it is.

    Raises:
        ValueError: two are the same file, one is in the model's directory, or a directory does not exist.
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
        taken.append((path, f"the {title} file"))


def _refuse_directory(path: Path, title: str) -> None:
    try:
        is_directory = path.is_dir()
    except OSError as error:  # as a name that is too long
        raise ValueError(f"The {title} {path} cannot be used: {error.strerror}.") from None
    if is_directory:
        raise ValueError(f"The {title} {path} is a directory: give a file name.")


def _model_path(name: str) -> Path:
    """Where a model's file is, or would be; a hub id is as good as none."""
    known = CATALOG.get(name)
    return Path(name) if known is None else known.cached(cache_directory())


def load_llm(args: argparse.Namespace) -> "LLM":
    """The engine that was asked for, with loading and compiling shown on stderr."""
    from twinmesh.engine.api.llm import LLM

    return LLM(
        args.model,
        topology=args.topology,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        deterministic=args.deterministic,
        decode_steps=args.decode_steps,
        enable_prefix_caching=args.prefix_caching,
        decision_log=args.decision_log,
        progress=True,
    )


def not_empty(text: str) -> str:
    """The type of an argument that names something: an empty one would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a name")
    return text


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, `least` or more."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
        return number

    return read


def _topology(text: str) -> Topology:
    try:
        return Topology.parse(text)
    except TopologyError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
