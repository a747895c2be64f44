"""The head of the JSON files that are written here: what a file is, and of which version its layout is."""

import msgspec


class Head(msgspec.Struct, frozen=True):
    """The fields that every file begins with; what follows them is not looked at."""

    format: str
    version: int


def head_of(data: bytes) -> Head | None:
    """Return the head of a file; None: it is no JSON of ours."""
    try:
        return msgspec.json.decode(data, type=Head)
    except (ValueError, RecursionError):
        return None


def check_head(data: bytes, name: str, expected: Head, *, kind: str, made_by: str) -> None:
    """Refuse what has another head than `expected`.

    Args:
        data: the file's content.
        name: of the file, for the message.
        expected: what it has to be.
        kind: what such a file is called.
        made_by: what writes such files.

    Raises:
        ValueError: it is something else, or of another version.
    """
    head = head_of(data)
    if head is None or head.format != expected.format:
        raise ValueError(f"{name} is no {kind}: give the JSON that {made_by} wrote.")
    if head.version != expected.version:
        raise ValueError(
            f"{name} is a {kind} of version {head.version}, and this reads {expected.version}: make it again."
        )
