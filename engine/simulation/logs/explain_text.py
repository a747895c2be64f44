"""Explanations as text, at most 100 columns wide."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from .explain import PARTS, Explanation

WIDTH = 100


def as_text(found: Sequence[Explanation]) -> str:
    """Return a paragraph for each request, lines ended by a line feed."""
    return "\n".join("".join(f"{line}\n" for line in _lines(one)) for one in found)


def _lines(one: Explanation) -> Iterator[str]:
    chunks = f"{one.chunks} step{'' if one.chunks == 1 else 's'} on mesh {one.mesh}"
    cached = f", {one.cached:,} of them cached" if one.cached else ""
    yield (
        f"request {one.request_id}: first token after {_ms(one.ttft)} ({one.prompt_len:,} prompt tokens{cached}; "
        f"{chunks})"
    )
    for part, seconds in sorted(one.parts.items(), key=lambda pair: -pair[1]):
        share = seconds / one.ttft if one.ttft else 0.0
        first, *rest = wrap(PARTS[part], WIDTH - 35)
        yield f"  {_ms(seconds):>13} {share:6.1%}  {part:10} {first}"
        yield from (f"{'':35}{line}" for line in rest)
    if one.restarts:
        yield f"  it started over {one.restarts} time{'' if one.restarts == 1 else 's'} before"
    if one.behind:
        named = [f"request {b.request_id} ({b.tokens:,} tokens, {_ms(b.seconds)})" for b in one.behind]
        yield from _wrapped(f"computed while it waited: {', '.join(named)}")
    if one.prefix_of:
        yield from _wrapped(f"its beginning was computed by request {', '.join(map(str, one.prefix_of))}")
    if one.idle:
        which = "other meshes" if one.idle_mesh is None else f"mesh {one.idle_mesh}"
        yield from _wrapped(
            f"for {_ms(one.idle)} of its waiting a mesh that could have prefilled it computed nothing, {which} longest"
        )
    elif len(one.mesh_utilisation) > 1:
        yield "  no other mesh that could have prefilled it stood idle while it waited"
    each = ", ".join(f"mesh {mesh} {used:.0%}" for mesh, used in enumerate(one.mesh_utilisation[:8]))
    more = ", ..." if len(one.mesh_utilisation) > 8 else ""
    yield f"  utilisation meanwhile, which does not tell: {one.utilisation:.1%} ({each}{more})"


def _wrapped(text: str) -> Iterator[str]:
    yield from wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
