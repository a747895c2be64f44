"""What vLLM has and Twinmesh lacks, by vLLM's names, and what to use instead. No JAX here.

A call with a name that it lacks is a TypeError of one sentence. The names are data, in `vllm_tables.py`.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping

from .vllm_tables import ENGINE, GENERATE, IGNORED, METHODS, SAMPLING


def unknown(what: str, kind: str, name: str, instead: Mapping[str, str], known: Iterable[str]) -> str:
    """Say that `what` lacks an argument: what is to be used instead of vLLM's, or else the nearest that there is."""
    if name in instead:
        return f"{what} has no {kind} {name}, which vLLM has: {instead[name]}."
    close = difflib.get_close_matches(name, list(known), n=1)
    what_to_do = f"the nearest is {close[0]}" if close else f"help({what}) lists them"
    return f"{what} has no {kind} {name}: {what_to_do}."


def names_what_is_missing[**P, R](
    what: str, instead: Mapping[str, str], more: type | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a method that is called with an argument that it lacks say what to use instead, in its TypeError.

    One of vLLM's that is None or False asks for nothing, and is left out.
    `what` is what callers call it, `more` the TypedDict of its `**` parameter, if it has one: its signature shows them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, annotation in (inspect.get_annotations(more) if more else {}).items():
            named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=annotation))
        known = [parameter.name for parameter in named[1:]]  # without self
        positional = [p.name for p in named[1:] if p.kind is not inspect.Parameter.KEYWORD_ONLY]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in [name for name in kwargs if name not in known]:
                if name not in instead or not (kwargs[name] is None or kwargs[name] is False):
                    raise TypeError(unknown(what, "argument", name, instead, known))
                del kwargs[name]
            if len(args) - 1 > len(positional):
                raise TypeError(f"{what} takes {', '.join(positional)} by position: give other arguments by name.")
            return function(*args, **kwargs)

        checked.__dict__["__signature__"] = signature.replace(parameters=named)
        return checked

    return decorate


def names_missing_fields[T](instead: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Let a dataclass that is made with a field that it lacks say what to use instead, in its TypeError."""

    def decorate(made: type[T]) -> type[T]:
        setattr(made, "__init__", names_what_is_missing(made.__name__, instead)(made.__init__))  # noqa: B010 (mypy)
        return made

    return decorate


def as_table() -> str:
    """Write the tables in Markdown, for the reference."""
    groups = {
        "option of `LLM`": {name: instead for name, instead in ENGINE.items() if name not in IGNORED},
        "argument of `SamplingParams`": SAMPLING,
        "argument of `generate`": GENERATE,
        "method": METHODS,
    }
    parts = []
    for title, names in groups.items():
        rows = [f"| `{name}` | {instead} |" for name, instead in sorted(names.items())]
        parts.append("\n".join([f"| vLLM's {title} | here |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
