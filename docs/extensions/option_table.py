"""Put the options of an engine, and the defaults by platform, into the page that asks for them: an mkdocs hook.

The tables are made by the package itself, so that each is described in one place.
"""

from typing import Any

from twinmesh.engine.options import as_table
from twinmesh.engine.startup import defaults

TABLES = {"{{ options }}": as_table, "{{ defaults }}": defaults.as_table}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each placeholder by its table."""
    for place, table in TABLES.items():
        if place in markdown:
            markdown = markdown.replace(place, table())
    return markdown
