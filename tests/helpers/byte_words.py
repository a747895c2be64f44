"""A small vocabulary of bytes and some pairs, and answers drawn over it with random logits under a grammar's masks."""

import numpy as np


class ByteWords:
    """A tokenizer of bytes, some texts of several, control tokens and two ends."""

    vocab_size, control_ids, eos_token_ids = 310, frozenset(range(300, 305)), frozenset({300, 301})
    pieces = [bytes([i]) for i in range(256)] + [b'{"', b"</", b"think", b">\n", b">{", b"> x", b"  ", b'": ']
    pieces += [b"" for _ in range(len(pieces), 300)] + [b"<|eos|>", b"<|eot|>", b"<|a|>", b"<|b|>", b"<|c|>"]
    pieces += [b"" for _ in range(len(pieces), 310)]

    def piece(self, token_id):
        return self.pieces[token_id]

    def encode(self, text, *, add_special=True):
        return list(text.encode())


def allowed(matcher):
    """The tokens that may come next."""
    mask = np.empty(matcher.words, np.int32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def drawn(grammar, seed, most=400):
    """Draw an answer with random logits, in which ends and closing characters weigh the more the longer it gets; None:
    it did not end within `most` tokens."""
    random, matcher, text = np.random.default_rng(seed), grammar.matcher(), b""
    closing = [*b'"}],', *ByteWords.eos_token_ids]
    for index in range(most):
        logits = 2 * random.standard_normal(ByteWords.vocab_size)
        logits[closing] += 0.1 * index
        may_come = allowed(matcher)
        assert len(may_come), (text, matcher.failure)
        token = int(may_come[logits[may_come].argmax()])
        if token in ByteWords.eos_token_ids:
            return text.decode()
        matcher.push(token)
        assert matcher.failure is None, (text, matcher.failure)
        text += ByteWords.pieces[token]
    return None
