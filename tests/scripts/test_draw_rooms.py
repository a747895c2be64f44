"""Rooms, floors and the picture of imports."""

import pytest
from twinmesh.scripts import draw_rooms

FOLDERS = {"twinmesh.engine.core", "twinmesh.models.text"}
IMPORTS = {"a/": ["b/", "c.py"], "b/": ["c.py"], "c.py": []}


@pytest.mark.parametrize(
    ("module", "room"),
    [
        ("twinmesh.engine.core.engine_core", "engine/core/"),
        ("twinmesh.engine.core", "engine/core/"),
        ("twinmesh.engine.config", "engine/config.py"),
        ("twinmesh.models.text.chat", "models/text/"),
        ("twinmesh.scripts.bench.host", "scripts/"),
        ("twinmesh.engine", None),
        ("twinmesh", None),
    ],
)
def test_a_module_lies_in_a_room(module, room):
    assert draw_rooms.room_of(module, FOLDERS) == room


def test_a_room_stands_one_floor_above_all_that_it_imports():
    assert draw_rooms.floors_of(IMPORTS) == [["c.py"], ["b/"], ["a/"]]


def test_rooms_in_a_circle_are_refused():
    with pytest.raises(ValueError, match="in a circle"):
        draw_rooms.floors_of({"a/": ["b/"], "b/": ["a/"]})


def test_every_arrow_points_down():
    floors = draw_rooms.floors_of(IMPORTS)
    picture = draw_rooms.draw(IMPORTS, floors)
    paths = [line for line in picture.splitlines() if line.startswith("<path")]
    assert len(paths) == 3
    for path in paths:
        start, *_, end = path.split('"')[1].replace("C", " ").removeprefix("M").split()
        assert float(path.split('"')[1].removeprefix("M").split("C")[0].split()[1]) < float(end), start


def test_the_picture_in_docs_is_of_todays_imports():
    assert draw_rooms.main(["--check"]) == 0
