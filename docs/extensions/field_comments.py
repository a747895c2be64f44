"""A griffe extension: a trailing comment on a field's first line is that field's docstring in the reference.

Field lists in this package are documented by one trailing comment a field, which griffe by itself does not read.
Comments for tools (`noqa`, `type: ignore`, `fmt: skip`) are no documentation.
"""

import io
import tokenize
from typing import Any

from griffe import Attribute, Docstring, Extension

_FOR_TOOLS = ("noqa", "type:", "fmt:", "pragma")


class FieldComments(Extension):
    """Reads trailing comments of attributes that have no docstring."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Take the comment on the attribute's first line, if there is one."""
        if attr.docstring is not None or attr.lineno is None or isinstance(attr.filepath, list):  # a namespace's
            return
        text = trailing_comment(attr.lines_collection[attr.filepath][attr.lineno - 1])
        if text:
            attr.docstring = Docstring(text, lineno=attr.lineno, endlineno=attr.lineno, parent=attr)


def trailing_comment(line: str) -> str:
    """Return the comment after the code on a line, without its mark; empty if there is none, or it is for a tool."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, IndentationError):  # the first of several lines
        return ""
    comments = [token for token in tokens if token.type == tokenize.COMMENT and token.start[1] > 0]
    text = comments[0].string.lstrip("# ") if comments else ""
    return "" if text.startswith(_FOR_TOOLS) else text
