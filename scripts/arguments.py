"""The arguments that several commands share, and what they turn into. No JAX until `load_llm` is called."""

import argparse
from typing import TYPE_CHECKING

from twinmesh.engine.config import DTYPES, Topology, TopologyError
from twinmesh.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from twinmesh.engine.llm import LLM


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model runs, and on what."""
    group = parser.add_argument_group("model and devices")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="a name that 'twinmesh fetch' knows, such as smollm2, or the path of a checkpoint",
    )
    group.add_argument(
        "--topology",
        default="both=1",
        type=_topology,
        metavar="ROLES",
        help="device meshes and what each is for: both=1 shares one, prefill=1,decode=1 keeps prefill and decode apart "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of weights, activations and KV (default: %(default)s)"
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt and completion together, in tokens; less takes less memory (default: the engine's choice)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, which: str) -> None:
    """How tokens are chosen and when to stop. `which` says, in the help, what the values hold for."""
    group = parser.add_argument_group("sampling", which)
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="most tokens to generate (default: %(default)s)"
    )
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
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens again")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling that was asked for; ValueError where a value is out of range."""
    return SamplingParams(temperature=args.temperature, top_p=args.top_p, seed=args.seed, max_tokens=args.max_tokens)


def load_llm(args: argparse.Namespace) -> "LLM":
    """The engine that was asked for, with loading and compiling shown on stderr."""
    from twinmesh.engine.llm import LLM  # JAX takes a second to import, which --help should not

    return LLM(
        args.model,
        topology=args.topology,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        progress=True,
    )


def _topology(text: str) -> Topology:
    try:
        return Topology.parse(text)
    except TopologyError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
