"""The pages of docs/decisions: their form, their numbers, and the index that leads to them."""

import re
from pathlib import Path

import pytest
import twinmesh

DECISIONS = Path(twinmesh.__file__).parent / "docs" / "decisions"
PAGES = sorted(path.name for path in DECISIONS.glob("*.md") if path.name != "README.md")
INDEX = (DECISIONS / "README.md").read_text()
STATUS = re.compile(r"accepted|proposed|rejected|superseded by \[(\d{4})\]\(\1-[a-z0-9-]+\.md\)")


def head(name):
    """The heading, date and status of a page."""
    title, date, status = (DECISIONS / name).read_text().split("\n\n")[:3]
    return title, date, status


def test_pages_are_numbered_from_one_without_gaps():
    assert [int(name[:4]) for name in PAGES] == list(range(1, len(PAGES) + 1))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_its_number_date_and_status(name):
    title, date, status = head(name)
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", name)
    assert title.startswith(f"# {name[:4]}. ")
    assert re.fullmatch(r"Date: \d{4}-\d{2}-\d{2}", date)
    assert STATUS.fullmatch(status.removeprefix("Status: "))


def test_the_index_lists_every_page_once_by_its_title_and_status():
    listed = re.findall(r"^- \[(\d{4})\]\(([^)]+)\) (.+)$", INDEX, re.MULTILINE)
    assert sorted(name for _, name, _ in listed) == PAGES
    for number, name, text in listed:
        title, _, status = head(name)
        status = status.removeprefix("Status: ").split("]")[0].replace("[", "")
        assert f"# {number}. {text}" == (title if status == "accepted" else f"{title} ({status})")
