"""Converts tokens back to text, one token at a time, over bytes, as the decoder of a tokenizer.json does.

Two families of vocabularies are supported: byte-level ones, whose characters stand for bytes by GPT-2's table, and
SentencePiece's, where "▁" is a space and `<0xNN>` a byte. `byte_decoder` reads from a `tokenizers` decoder which one it
is, and refuses other decoders by name. Invariant: a `TextStream` never retracts text, so its pieces joined are the text
of all the tokens. Ids and special tokens are handled in `tokenizer.py`.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers.decoders import Decoder

from ..errors import CheckpointError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]")


def _byte_of_character() -> dict[str, int]:
    """Map each of GPT-2's printable stand-ins to its byte.

    Printable Latin-1 bytes stand for themselves; the other 68 are U+0100 onwards in order (Radford et al. 2019,
    encoder.py `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@dataclass(frozen=True)
class ByteDecoder:
    """Turns tokens into bytes, as the decoder of a tokenizer.json does."""

    byte_level: bool = False  # whether characters stand for bytes
    byte_tokens: bool = False  # whether `<0xNN>` is a byte
    space: str | None = None  # the character that stands for a space; None: no character does
    strip: int = 0  # at most so many `stripped` characters are removed from the start of a text
    stripped: str = " "
    bare_start: bool = False  # whether the first token loses all its `space` characters, as in Metaspace

    def token_bytes(self, token: str) -> bytes:
        """Return the bytes that `token` stands for inside a text."""
        if self.byte_level:
            known = all(c in _BYTE_OF_CHARACTER for c in token)
            return bytes(_BYTE_OF_CHARACTER[c] for c in token) if known else token.encode()
        if self.byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token if self.space is None else token.replace(self.space, " ")).encode()

    def first_bytes(self, token: str) -> bytes:
        """Return the bytes that `token` stands for at the start of a text."""
        bare = self.bare_start and self.space is not None
        return self.token_bytes(token.replace(self.space or "", "") if bare else token)


class TextStream:
    """Decodes bytes to text as they arrive; bytes that are not UTF-8 become U+FFFD.

    A byte-level decoder gives one U+FFFD for each maximal run of bytes that starts like a character, as Unicode
    recommends and `tokenizers` does; SentencePiece gives one for each byte that is in no character.
    """

    def __init__(self, decoder: ByteDecoder, strip: int) -> None:
        """`strip`: at most so many of the decoder's `stripped` characters are removed from the start."""
        self._decoder, self.to_strip = decoder, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace" if decoder.byte_level else "surrogateescape")

    def push(self, more: bytes, is_last: bool = False) -> str:
        """Return the text that `more` completes; up to 3 bytes of an unfinished character are kept unless `is_last`."""
        text = self._utf8.decode(more, is_last)
        if not self._decoder.byte_level and not text.isascii():
            text = _ESCAPED.sub("\ufffd", text)
        while self.to_strip and text:
            if text[0] != self._decoder.stripped:
                self.to_strip = 0
                break
            text, self.to_strip = text[1:], self.to_strip - 1
        return text


def byte_decoder(decoder: Decoder | None) -> ByteDecoder:
    """Convert the library's `decoder` to a `ByteDecoder`.

    Raises:
        CheckpointError: no decoder, or one that is not implemented; names those that are.
    """
    parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return ByteDecoder(byte_level=True)
    found, fused = ByteDecoder(), False
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "} if len(space) == 1:
                found = replace(found, space=space)
            case {"type": "ByteFallback"}:
                found = replace(found, byte_tokens=True)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(stripped), "start": int(start), "stop": 0} if fused:
                found = replace(found, strip=start, stripped=stripped)
            case {"type": "Metaspace", "replacement": str(space), **rest}:
                bare = rest.get("prepend_scheme", "always") != "never"
                found = replace(found, space=space, bare_start=bare)
            case _:
                raise CheckpointError(_refusal(parts))
    if found.space is None:
        raise CheckpointError(_refusal(parts))
    return found


def _parts(state: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [part for inner in state["decoders"] for part in _parts(inner)]


def _refusal(parts: Sequence[Mapping[str, Any]]) -> str:
    names = " + ".join(str(part["type"]) for part in parts) or "none"
    return (
        f"The tokenizer's decoder ({names}) is not supported; supported: ByteLevel, Metaspace, and sequences of "
        "Replace of one character by a space, ByteFallback, Fuse and a Strip at the start."
    )
