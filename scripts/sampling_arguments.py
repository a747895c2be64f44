"""The arguments that say how tokens are chosen, of the commands that generate, and what they turn into. No JAX."""

import argparse
import json
from typing import Any

from twinmesh.engine.api.sampling_params import SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, which: str) -> None:
    """Declare how tokens are chosen and when to stop. `which` says in the help what the values apply to."""
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


def add_template_variables(parser: argparse.ArgumentParser, which: str) -> None:
    """Declare the variables of the chat template. `which` says, in the help, for what they hold."""
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help=f"{which}: variables of the chat template, such as '{{\"enable_thinking\": false}}'",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"enable_thinking\": false}}'")
    return value


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling that was asked for; raise ValueError if a value is out of range."""
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
