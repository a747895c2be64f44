"""Text to token ids and back, over the `tokenizers` library; where a tokenizer comes from is of no concern here.

Encoding is the library's. Decoding is our own, over bytes: it makes the streaming form exact and O(1) per token
(`tokenizers.decoders.DecodeStream` re-decodes a growing window while the text ends in U+FFFD, and keeps what it holds
back at the end). Sources are `tokenizer_gguf.py` and `tokenizer_files.py`; for chat templates see `chat.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as BackendTokenizer

from ..errors import CheckpointError
from .byte_decoder import TextStream, decoding

# Of a text that is long for the tokens it may have, so many characters a token are looked at first; most have fewer.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class SpecialTokens:
    """Texts of the tokens that have a part to play, None where a model has none, and what ends a generation.

    `eos_token_ids` are ids; several may end a generation, such as the end of a turn and the end of a document.
    """

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    eos_token_ids: frozenset[int] = frozenset()


class TokenStream:
    """Detokenises one sequence piece by piece; the pieces joined equal `Tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool) -> None:
        """Use `Tokenizer.stream`."""
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._start()

    def _start(self) -> None:
        self._text, self._is_first = TextStream(self._tokenizer.decoding), True

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character are held back (3 at most)."""
        return self._text.push(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        """What is still held back: U+FFFD for an unfinished character, else nothing. The stream may be used again."""
        text = self._text.push(b"", is_last=True)
        self._start()
        return text

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special and token_id in self._tokenizer.control_ids:
            return b""
        piece = self._tokenizer.piece(token_id, is_first=self._is_first)
        # An id that stands for nothing leaves the next one first.
        self._is_first = self._is_first and self._tokenizer.backend.id_to_token(token_id) is None
        return piece


class Tokenizer:
    """A tokenizer with what the engine asks of it.

    `vocab_size` is one more than the highest id that may be used; a model may have more rows than that. `bos_token`,
    `eos_token`, `unk_token` and `pad_token` are texts (None: the model has none), `eos_token_ids` the ids that end a
    generation, `control_ids` the special tokens, which are not part of a text. `add_bos`: `encode` puts BOS first.
    """

    def __init__(self, backend: BackendTokenizer, special: SpecialTokens) -> None:
        """`backend` with its decoder and post-processor; it is this object's from now on.

        Raises:
            CheckpointError: a decoder that is not implemented.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.special = backend, special
        self.decoding = decoding(backend.decoder)
        self.bos_token, self.eos_token = special.bos, special.eos
        self.unk_token, self.pad_token = special.unk, special.pad
        self.eos_token_ids = special.eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)
        ordinary = backend.get_vocab(with_added_tokens=False).values()
        self._ordinary_size: int = 1 + max((i for i in ordinary if i not in added), default=-1)
        self.vocab_size = max(self._ordinary_size, 1 + max(added, default=-1))
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        self.add_bos = special.bos is not None and first == [backend.token_to_id(special.bos)]
        self._bytes: dict[int, bytes] = {}

    def limit(self, rows: int) -> None:
        """Say that the model has `rows` rows of embeddings.

        More rows than tokens are padding. Added tokens past the last row cannot be used, which lowers `vocab_size`:
        Gemma 3's text models have such a one, for images.

        Raises:
            CheckpointError: ordinary tokens past the last row.
        """
        if self._ordinary_size > rows:
            raise CheckpointError(f"The tokenizer has {self.vocab_size} tokens, the model {rows}.")
        self.vocab_size = min(self.vocab_size, rows)
        self.eos_token_ids = frozenset(i for i in self.eos_token_ids if i < rows)

    def encode(self, text: str, *, add_special: bool = True, at_most: int | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        BOS comes first if the model wants it, and EOS last; `add_special=False` leaves them out, for text that already
        has them, such as a rendered chat template. `at_most`: a text of more tokens is of no use, so what begins with
        twice as many is refused for its beginning: the library takes some 100 bytes of memory for each character.

        Raises:
            ValueError: half of a surrogate pair, which JSON can spell but UTF-8 cannot, or far more than `at_most`.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The text has a lone surrogate at character {error.start}: it is not Unicode.") from None
        if at_most is not None and self._is_far_longer(text, at_most):
            raise ValueError(
                f"The text has {len(text)} characters, and {at_most} tokens is the most there is room for "
                "(max_model_len): shorten it."
            )
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def _is_far_longer(self, text: str, tokens: int) -> bool:
        """Whether the beginning alone has twice as many; no more of a text is tokenised than that takes."""
        start = _CHARACTERS_PER_TOKEN * tokens
        return len(text) > start and len(self.backend.encode(text[:start], add_special_tokens=False)) > 2 * tokens

    def encode_after(self, text: str) -> list[int]:
        """Token ids of `text` where it goes on after other text: no special tokens, nor the space that SentencePiece
        puts before a text of its own. Raises as `encode` does."""
        ids = self.encode(text, add_special=False)
        start = self.encode("\n", add_special=False)
        if not (ids and start) or not self.piece(start[0]).startswith(b" "):
            return ids
        whole = self.encode("\n" + text, add_special=False)
        return whole[len(start) :] if whole[: len(start)] == start else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Control tokens are left out unless told otherwise.

        Ids past the vocabulary, which a model with padded embeddings can sample, stand for nothing.

        Raises:
            ValueError: a negative id.
        """
        stream = self.stream(skip_special)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special: bool = True) -> TokenStream:
        """A detokeniser for ids that arrive over time."""
        return TokenStream(self, skip_special)

    def token_bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        """The bytes that `ids` stand for inside a text, joined; raises as `decode` does."""
        return b"".join(self.piece(i) for i in ids if not (skip_special and i in self.control_ids))

    def piece(self, token_id: int, *, is_first: bool = False) -> bytes:
        """The bytes that one token stands for, at the start of a text or inside; raises as `decode` does."""
        if token_id < 0:
            raise ValueError(f"Token id {token_id} is negative.")
        if is_first and self.decoding.bare_start:
            return self.decoding.first_bytes(self.backend.id_to_token(token_id) or "")
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id) or ""
            is_itself = token_id in self._added and self.decoding.byte_level
            self._bytes[token_id] = token.encode() if is_itself else self.decoding.token_bytes(token)
        return self._bytes[token_id]
