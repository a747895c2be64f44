"""Draw which room of the package imports which: floors from the ground up, as docs/rooms.svg.

    python scripts/draw_rooms.py           writes docs/rooms.svg and prints rooms, floors and arrows
    python scripts/draw_rooms.py --check   fails if the picture is not of these imports

A room is a folder of `engine/` or `models/`, a file that lies beside those folders, or a top-level folder. It stands
one floor above the highest room that it imports, so every arrow points down; rooms that import each other in a circle
are refused. Imports under TYPE_CHECKING count. Nothing is executed: grimp reads the source.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from html import escape
from pathlib import Path

import twinmesh

PICTURE = Path(twinmesh.__file__).parent / "docs" / "rooms.svg"
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN, _LABEL = 132, 30, 14, 58, 16, 64  # pixels
_NESTED = ("engine", "models")
type Imports = Mapping[str, Sequence[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture, or compare it with the one that is there; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the picture is out of date")
    args = parser.parse_args(argv)
    try:
        imports = read_imports()
        floors = floors_of(imports)
    except (ImportError, ValueError) as error:
        print(f"draw_rooms: {error}", file=sys.stderr)
        return 1
    picture = draw(imports, floors)
    if args.check:
        return _check(picture)
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"{len(imports)} rooms on {len(floors)} floors, {sum(map(len, imports.values()))} arrows, none upward")
    for number in reversed(range(len(floors))):
        for room in floors[number]:
            print(f"  {number}  {room:<24} -> {', '.join(imports[room]) or 'nothing'}")
    return 0


def _check(picture: str) -> int:
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    print(f"draw_rooms: {PICTURE} is not of today's imports: run python scripts/draw_rooms.py.", file=sys.stderr)
    return 1


def read_imports() -> dict[str, list[str]]:
    """Return each room and the other rooms that its modules import, both in alphabetical order.

    Raises:
        ImportError: grimp is not installed.
    """
    try:
        import grimp
    except ImportError:
        raise ImportError("grimp is not installed: pip install 'twinmesh[test]'.") from None
    graph = grimp.build_graph("twinmesh", cache_dir=None)
    folders = {".".join(module.split(".")[:3]) for module in graph.modules if module.count(".") == 3}
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules - {"twinmesh"}:
        room = room_of(module, folders)
        if room is not None:
            targets = {room_of(target, folders) for target in graph.find_modules_directly_imported_by(module)}
            found[room] |= {target for target in targets if target not in (None, room)}
    return {room: sorted(found[room]) for room in sorted(found)}


def room_of(module: str, folders: set[str]) -> str | None:
    """Return the room of a module like `twinmesh.engine.core.engine_core`; None for a package that only has rooms."""
    _, *parts = module.split(".")
    if not parts or (len(parts) == 1 and parts[0] in _NESTED):
        return None
    if parts[0] in _NESTED:
        folder = ".".join(module.split(".")[:3])
        return "/".join(parts[:2]) + ("/" if folder in folders else ".py")
    return parts[0] + "/"


def floors_of(imports: Imports) -> list[list[str]]:
    """Return the rooms by floor, the ground first.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    try:
        order = list(TopologicalSorter({room: set(targets) for room, targets in imports.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"rooms import each other in a circle: {' <- '.join(error.args[1])}.") from None
    level: dict[str, int] = {}
    for room in order:
        level[room] = 1 + max((level[target] for target in imports[room]), default=-1)
    return [[room for room in sorted(level) if level[room] == number] for number in range(max(level.values()) + 1)]


def draw(imports: Imports, floors: Sequence[Sequence[str]]) -> str:
    """Return the picture as SVG: a row of boxes for each floor, the ground at the bottom; a line for each import."""
    widest = max(map(len, floors))
    width = _LABEL + widest * (_WIDTH + _GAP_X) + _MARGIN
    height = 2 * _MARGIN + len(floors) * _HEIGHT + (len(floors) - 1) * _GAP_Y
    corner = {}
    for number, rooms in enumerate(floors):
        y = height - _MARGIN - _HEIGHT - number * (_HEIGHT + _GAP_Y)
        left = _LABEL + (widest - len(rooms)) * (_WIDTH + _GAP_X) // 2
        for column, room in enumerate(rooms):
            corner[room] = left + column * (_WIDTH + _GAP_X), y
    lines = [_line(corner[room], corner[target]) for room in imports for target in imports[room]]
    boxes = [_box(room, *corner[room]) for rooms in floors for room in rooms]
    labels = [
        f'<text x="{_MARGIN}" y="{corner[rooms[0]][1] + 19}" fill="#777">floor {number}</text>'
        for number, rooms in enumerate(floors)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{width}" height="{height}" fill="#fff"/>'
    )
    return "\n".join([head, *lines, *boxes, *labels, "</svg>\n"])


def _line(above: tuple[int, int], below: tuple[int, int]) -> str:
    """Return the line from the bottom of the importing room to the top of the imported one, as SVG."""
    (x1, y1), (x2, y2) = above, below
    x1, x2, y1 = x1 + _WIDTH // 2, x2 + _WIDTH // 2, y1 + _HEIGHT
    middle = (y1 + y2) // 2
    return f'<path d="M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}" fill="none" stroke="#7a9cc6" opacity=".55"/>'


def _box(room: str, x: int, y: int) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" fill="#eef3fa" stroke="#4a6fa5"/>'
        f'<text x="{x + _WIDTH // 2}" y="{y + 19}" text-anchor="middle">{escape(room)}</text>'
    )


if __name__ == "__main__":
    sys.exit(main())
