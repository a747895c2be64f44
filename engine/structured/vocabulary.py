"""A model's vocabulary as llguidance sees it: the bytes of every token, and one more token that stands for the end.

The end is a token past the vocabulary, so that whether an answer may end is a bit of every mask, whatever tokens end
this model's answers. Control tokens are in no text, and a grammar means one only by its name (`<|name|>` in Lark).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from ..host.extras import need


class Words(Protocol):
    """What is needed of a tokenizer (`models/text/tokenizer.py`)."""

    vocab_size: int
    control_ids: frozenset[int]
    eos_token_ids: frozenset[int]

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for inside a text."""
        ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Convert a text to token ids."""
        ...


class Vocabulary:
    """The vocabulary of one tokenizer, read by llguidance; making one takes about a second for 150,000 tokens.

    Raises:
        ValueError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Words) -> None:
        self.guidance: Any = need("llguidance", "structured", "structured output")
        self.size, self.ends = tokenizer.vocab_size, tokenizer.eos_token_ids
        self.pieces = [tokenizer.piece(token) for token in range(self.size)]
        wrapper: Any = need("llguidance._tokenizer", "structured", "structured output").TokenizerWrapper
        described = _Described(self.pieces, sorted(tokenizer.control_ids), tokenizer.encode)
        self.tokenizer: Any = self.guidance.LLTokenizer(wrapper(described), n_vocab=self.size + 1)
        self.words = (self.size + 32) // 32  # of a mask, with a bit for the end
        self.end_bits = bits([token for token in self.ends if token < self.size], self.words)  # [words] int32
        self.inner = bits(range(self.size), self.words) & ~self.end_bits  # [words] int32, of all other tokens

    def text_of(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of tokens; ids past the vocabulary stand for nothing."""
        return b"".join(self.pieces[token] for token in ids if token < self.size)


def bits(tokens: Iterable[int] | np.ndarray, words: int) -> np.ndarray:
    """Return a mask of these tokens, [words] int32."""
    is_set = np.zeros(32 * words, bool)
    is_set[np.fromiter(tokens, np.int64)] = True
    return np.packbits(is_set, bitorder="little").view(np.int32)


class _Described:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, pieces: list[bytes], special: list[int], encode: Callable[..., list[int]]) -> None:
        self.tokens = [*pieces, b"<end of the answer>"]
        self.eos_token_id, self.bos_token_id = len(pieces), None
        self.special_token_ids = [token for token in special if token < len(pieces)] + [len(pieces)]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenise, as llguidance asks: text, or bytes in a first test of whether those will do."""
        if isinstance(text, bytes):
            raise TypeError("text only")
        return self._encode(text, add_special=False)
