"""Put the options of an engine into the page that asks for them: an mkdocs hook.

The table is made by the package itself from `EngineOptions`, so that an option is described in one place.
"""

from typing import Any

from twinmesh.engine.options import as_table

PLACE = "{{ options }}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholder by the table."""
    return markdown.replace(PLACE, as_table())
