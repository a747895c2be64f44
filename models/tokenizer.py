"""Text to token ids and back, over the `tokenizers` library, built from a GGUF file's metadata.

Decoding joins the bytes of the tokens and replaces what is not UTF-8, which is what `tokenizers` does; doing it here
makes the streaming form exact and O(1) per token (`tokenizers.decoders.DecodeStream` re-decodes a growing window while
the text ends in U+FFFD, and keeps what it holds back at the end). Only byte-level BPE with llama.cpp's "smollm"
pre-tokenizer so far; others are refused by name. No chat templates here: see `chat.py`.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import BPE

from .errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_END_IDS = ("eos", "eot", "eom")  # tokenizer.ggml.<x>_token_id: each ends a generation
_END_NAMES = ("<|endoftext|>", "<|im_end|>")  # end a generation as control tokens even where the metadata names another


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted: the printable Latin-1 bytes stand for themselves, the other 68
    for U+0100 onwards in order (Radford et al. 2019, encoder.py `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class TokenStream:
    """Detokenises one sequence piece by piece; the pieces joined equal `Tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool) -> None:
        """Use `Tokenizer.stream`."""
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character are held back (3 at most)."""
        return self._utf8.decode(self._tokenizer.token_bytes(ids, self._skip_special))

    def finish(self) -> str:
        """What is still held back: U+FFFD for an unfinished character, else nothing. The stream may be used again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class Tokenizer:
    """A byte-level BPE tokenizer.

    `vocab_size` counts the tokens, `bos_token` and `eos_token` are texts (None: the model has none), `eos_token_ids`
    are the ids that end a generation.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Build from the `tokenizer.ggml.*` keys of a GGUF file.

        Raises:
            CheckpointError: keys that are missing or damaged, or a kind of tokenizer that is not implemented.
        """
        self._tokens = _list(metadata, "tokens", str)
        kinds = _list(metadata, "token_type", int)
        if len(kinds) != len(self._tokens):
            raise CheckpointError(f"The tokenizer has {len(self._tokens)} tokens but {len(kinds)} token types.")
        self._control = frozenset(i for i, kind in enumerate(kinds) if kind == _CONTROL)
        self._user_defined = frozenset(i for i, kind in enumerate(kinds) if kind == _USER_DEFINED)
        self._backend = self._build(metadata)
        self._bytes: dict[int, bytes] = {}
        self._bos = self._special_id(metadata, "bos")
        eos = self._special_id(metadata, "eos")
        self.bos_token = None if self._bos is None else self._tokens[self._bos]
        self.eos_token = None if eos is None else self._tokens[eos]
        ends = {self._special_id(metadata, name) for name in _END_IDS}
        ends |= {i for i in self._control if self._tokens[i] in _END_NAMES}
        self.eos_token_ids = frozenset(i for i in ends if i is not None)
        self.add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False)) and self._bos is not None

    def _build(self, metadata: Mapping[str, Any]) -> BackendTokenizer:
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if model != "gpt2":
            raise CheckpointError(f"Tokenizer model {model!r} is not supported; supported: 'gpt2' (byte-level BPE).")
        if pre != "smollm":
            raise CheckpointError(f"Pre-tokenizer {pre!r} is not supported; supported: 'smollm'.")
        merges = [_pair(merge) for merge in _list(metadata, "merges", str)]
        try:
            backend = BackendTokenizer(BPE({token: i for i, token in enumerate(self._tokens)}, merges))
        except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
            raise CheckpointError(
                f"The tokenizer's merges do not fit its tokens: {' '.join(str(error).split())}."
            ) from None
        # llama.cpp's "smollm" rule: every numeral on its own, then GPT-2's regular expression.
        digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
        backend.add_special_tokens([AddedToken(self._tokens[i], normalized=False) for i in sorted(self._control)])
        backend.add_tokens([AddedToken(self._tokens[i], normalized=False) for i in sorted(self._user_defined)])
        return backend

    def _special_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        found = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if found is not None and not (isinstance(found, int) and 0 <= found < len(self._tokens)):
            raise CheckpointError(f"tokenizer.ggml.{name}_token_id = {found!r} is not a token.")
        return found

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return len(self._tokens)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        BOS comes first if the model wants it; `add_special=False` leaves it out, for text that already has it, such as
        a rendered chat template.

        Raises:
            ValueError: half of a surrogate pair, which JSON can spell but UTF-8 cannot.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The text has a lone surrogate at character {error.start}: it is not Unicode.") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids] if add_special and self.add_bos and self._bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Control tokens are left out unless told otherwise.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self.token_bytes(ids, skip_special).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> TokenStream:
        """A detokeniser for ids that arrive over time."""
        return TokenStream(self, skip_special)

    def token_bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        """The bytes that `ids` stand for, joined; raises as `decode` does."""
        return b"".join(self._one(i) for i in ids if not (skip_special and i in self._control))

    def _one(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            if not 0 <= token_id < len(self._tokens):
                raise ValueError(f"Token id {token_id} is outside the vocabulary of {len(self._tokens)} tokens.")
            token = self._tokens[token_id]
            stand_ins = token_id not in self._control and token_id not in self._user_defined
            known = stand_ins and all(c in _BYTE_OF_CHARACTER for c in token)
            self._bytes[token_id] = bytes(_BYTE_OF_CHARACTER[c] for c in token) if known else token.encode()
        return self._bytes[token_id]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CheckpointError(f"The tokenizer's merge {merge[:80]!r} is not two tokens.")
    return left, right


def _list[T](metadata: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not found or not all(isinstance(item, kind) for item in found):
        raise CheckpointError(
            f"The metadata has no list of {kind.__name__} under tokenizer.ggml.{name}, which the tokenizer needs."
        )
    return found
