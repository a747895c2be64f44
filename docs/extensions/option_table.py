"""Put tables that the package makes itself into the pages that ask for them: an mkdocs hook.

So that an option, a default by platform, or what stands in for one of vLLM's, is described in one place.
"""

from typing import Any

from twinmesh.engine import options
from twinmesh.engine.api import vllm_names
from twinmesh.engine.sizing import defaults

TABLES = {"{{ options }}": options.as_table, "{{ vllm }}": vllm_names.as_table, "{{ defaults }}": defaults.as_table}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each placeholder by its table."""
    for place, table in TABLES.items():
        if place in markdown:
            markdown = markdown.replace(place, table())
    return markdown
