"""Converts text to token ids and back, over the `tokenizers` library.

Encoding is the library's. Decoding is our own, over bytes, so that the streaming form is exact and O(1) per token
(`tokenizers.decoders.DecodeStream` re-decodes a growing window while the text ends in U+FFFD, and never gives out the
text that it still holds back at the end). `tokenizer_gguf.py` and `tokenizer_files.py` build tokenizers; chat templates
are in `chat.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer as BackendTokenizer

from ..errors import CheckpointError
from .byte_decoder import TextStream, byte_decoder
from .harmony_tokens import harmony_tokens

# Characters per token in the first test of whether a text is too long; most tokens have fewer.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class SpecialTokens:
    """Texts of a model's special tokens by name (None: it has none), and the ids that end a generation."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    eos_token_ids: frozenset[int] = frozenset()  # several, such as the end of a turn and the end of a document
    others: Mapping[str, str] = field(default_factory=dict)  # "sep_token" and the model's own names

    @property
    def standard(self) -> dict[str, str]:
        """Return the texts that this class has fields for, by the names that files and templates use."""
        texts = {"bos": self.bos, "eos": self.eos, "unk": self.unk, "pad": self.pad}
        return {f"{name}_token": text for name, text in texts.items() if text is not None}


class TokenStream:
    """Detokenises one sequence piece by piece; the pieces joined are the text of all the ids.

    `Tokenizer.stream` makes one.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool, after: Iterable[int]) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._strip, self._starts_text = tokenizer.byte_decoder.strip, True
        self._start()
        for token_id in after:
            if not (self._is_first or self._text.to_strip):
                break  # the text has begun
            self._text.push(self._bytes(token_id))
        self._text.push(b"", is_last=True)
        self._strip, self._starts_text = self._text.to_strip, self._is_first
        self._start()

    def _start(self) -> None:
        self._text, self._is_first = TextStream(self._tokenizer.byte_decoder, self._strip), self._starts_text

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete; bytes of an unfinished character are held back (3 at most)."""
        return self._text.push(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        """Return the text still held back, U+FFFD for an unfinished character, and reset the stream."""
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
    """Encodes and decodes text for one model."""

    def __init__(self, backend: BackendTokenizer, special: SpecialTokens) -> None:
        """Wrap `backend`, including its decoder and post-processor.

        Raises:
            CheckpointError: a decoder that is not implemented.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.special = backend, special
        self.byte_decoder = byte_decoder(backend.decoder)
        added = backend.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special)  # which are in no text
        self.harmony = harmony_tokens({added[i].content: i for i in self.control_ids})  # None: it has no such markers
        ends = special.eos_token_ids
        self.eos_token_ids = self.harmony.ends(ends) if self.harmony else ends  # that end a generation
        self._added = frozenset(added)
        ordinary = backend.get_vocab(with_added_tokens=False).values()
        self._ordinary_size: int = 1 + max((i for i in ordinary if i not in added), default=-1)
        # One more than the highest id that may be used; a model may have more rows than that.
        self.vocab_size = max(self._ordinary_size, 1 + max(added, default=-1))
        # Whether `encode` puts BOS first.
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        self.add_bos = special.bos is not None and first == [backend.token_to_id(special.bos)]
        self._bytes: dict[int, bytes] = {}

    def limit(self, rows: int) -> None:
        """Restrict the ids to the `rows` rows of the model's embedding.

        If there are more rows than tokens, the rest is padding. Added tokens past the last row cannot be used, which
        lowers `vocab_size`: Gemma 3's text models have one, for images.

        Raises:
            CheckpointError: ordinary tokens past the last row.
        """
        if self._ordinary_size > rows:
            raise CheckpointError(f"The tokenizer has {self.vocab_size} tokens, the model {rows}.")
        self.vocab_size = min(self.vocab_size, rows)
        self.eos_token_ids = frozenset(i for i in self.eos_token_ids if i < rows)

    def encode(self, text: str, *, add_special: bool = True, at_most: int | None = None) -> list[int]:
        """Convert `text` to token ids. Special tokens written out in it become their ids.

        Args:
            text: any Unicode text.
            add_special: whether to add BOS first and EOS last, where the model's tokenizer does; False for text that
                already has them, such as a rendered chat template.
            at_most: the most tokens that the caller can use. A text whose beginning alone has twice as many is refused,
                because the library takes some 100 bytes of memory per character.

        Raises:
            ValueError: half of a surrogate pair, which JSON can spell but UTF-8 cannot, or far more than `at_most`.
        """
        self._check_text(text, at_most)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = True, at_most: int | None = None
    ) -> list[list[int]]:
        """Convert texts to token ids as `encode` does, and raise as it does; they share the machine's cores."""
        for text in texts:
            self._check_text(text, at_most)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=add_special)]

    def _check_text(self, text: str, at_most: int | None) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The text has a lone surrogate at character {error.start}: it is not Unicode.") from None
        if at_most is not None and self._is_far_longer(text, at_most):
            raise ValueError(
                f"The text has {len(text)} characters, and {at_most} tokens is the most there is room for "
                "(max_model_len): shorten it."
            )

    def _is_far_longer(self, text: str, tokens: int) -> bool:
        """Tokenise just enough of the beginning to find out whether it has more than twice as many tokens."""
        start = _CHARACTERS_PER_TOKEN * tokens
        return len(text) > start and len(self.backend.encode(text[:start], add_special_tokens=False)) > 2 * tokens

    def encode_after(self, text: str) -> list[int]:
        """Convert `text` to token ids as the continuation of other text; raises as `encode` does.

        Neither special tokens nor the space that SentencePiece puts before a separate text are added.
        """
        ids = self.encode(text, add_special=False)
        start = self.encode("\n", add_special=False)
        if not (ids and start) or not self.piece(start[0]).startswith(b" "):
            return ids
        whole = self.encode("\n" + text, add_special=False)
        return whole[len(start) :] if whole[: len(start)] == start else ids

    @property
    def bos_token_id(self) -> int | None:
        """Return the id that begins a text; None: the model has none."""
        return self._id_of(self.special.bos)

    @property
    def eos_token_id(self) -> int | None:
        """Return the id that ends a text, as the model's files name it; None: they name none.

        A generation may end at others as well: `eos_token_ids`.
        """
        return self._id_of(self.special.eos)

    def _id_of(self, text: str | None) -> int | None:
        found: int | None = None if text is None else self.backend.token_to_id(text)
        return found

    def decode(self, ids: Sequence[int], skip_special: bool = True, *, skip_special_tokens: bool | None = None) -> str:
        """Convert `ids` to text; bytes that are not UTF-8 become U+FFFD.

        `skip_special`, or `skip_special_tokens` as vLLM and transformers call it, leaves control tokens out; here that
        is the default. Ids past the vocabulary, which a model with padded embeddings can sample, stand for nothing.

        Raises:
            ValueError: a negative id.
        """
        stream = self.stream(skip_special if skip_special_tokens is None else skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special: bool = True, after: Iterable[int] = ()) -> TokenStream:
        """Return a detokeniser for ids that arrive over time.

        They continue the text of the ids `after`, such as a prompt: a SentencePiece tokenizer takes a space off the
        start of a text, and what follows other text is not its start. The pieces joined are what is behind
        `decode(after)` in `decode(after + ids)`. A character that `after` leaves unfinished stays so.
        """
        return TokenStream(self, skip_special, after)

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token inside a text; a part of a character is U+FFFD. Raises as `decode` does."""
        return TextStream(self.byte_decoder, strip=0).push(self.piece(token_id), is_last=True)

    def piece(self, token_id: int, *, is_first: bool = False) -> bytes:
        """Return the bytes that one token stands for, at the start of a text or inside; raises as `decode` does."""
        if token_id < 0:
            raise ValueError(f"Token id {token_id} is negative.")
        if is_first and self.byte_decoder.bare_start:
            return self.byte_decoder.first_bytes(self.backend.id_to_token(token_id) or "")
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id) or ""
            is_itself = token_id in self._added and self.byte_decoder.byte_level
            self._bytes[token_id] = token.encode() if is_itself else self.byte_decoder.token_bytes(token)
        return self._bytes[token_id]
