"""From tokens back to text: every decoder that is supported against the library's own, whole and streamed."""

import pytest
from helpers.awkward_texts import awkward_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.tokenizer import SpecialTokens, Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁▁▁a", "a", "▁the", "b▁c", "é", "日", "👋", "\n", "▁\n", " ", "x y"]
PIECES = ["<unk>", *BYTES, *WORDS]
SPACE, FUSE, FALLBACK = decoders.Replace("▁", " "), decoders.Fuse(), decoders.ByteFallback()
SHAPES = {
    "Llama 2": [SPACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)],
    "Gemma": [SPACE, FALLBACK, FUSE],
    "no fuse": [SPACE, FALLBACK],
    "strip two": [SPACE, FUSE, decoders.Strip(" ", 2, 0)],
    "metaspace always": [decoders.Metaspace("▁", "always")],
    "metaspace first": [decoders.Metaspace("▁", "first")],
    "metaspace never": [decoders.Metaspace("▁", "never")],
}


def make(parts):
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    backend.add_tokens([AddedToken("<▁tool>", normalized=False)])
    return Tokenizer(backend, SpecialTokens())


TOKENIZERS = {name: make(parts) for name, parts in SHAPES.items()}
WORD = st.sampled_from([PIECES.index(word) for word in WORDS] + [len(PIECES), len(PIECES) + 1, 10**5])
# Bytes of whole characters, or of none: what both decoders agree about.
WHOLE = st.text(max_size=3).map(lambda text: [1 + byte for byte in text.encode()])
BROKEN = st.lists(st.integers(0x80, 0xBF), min_size=1, max_size=3).map(lambda run: [1 + byte for byte in run])
RUN = st.tuples(WORD.map(lambda i: [i]) | st.just([PIECES.index("a")]), WHOLE | BROKEN)
IDS = st.lists(RUN, max_size=8).map(lambda runs: [i for word, run in runs for i in [*word, *run, PIECES.index("a")]])


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=200)
@given(ids=IDS, skip=st.booleans())
def test_decoding_equals_the_library(name, ids, skip):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=100)
@given(pieces=st.lists(st.lists(st.integers(0, len(PIECES) + 2), max_size=6), max_size=8), skip=st.booleans())
def test_streaming_any_tokens_in_any_pieces_equals_decoding_at_once(name, pieces, skip):
    tokenizer, ids, text = TOKENIZERS[name], [], ""
    stream = tokenizer.stream(skip)
    for piece in pieces:
        ids, text = ids + piece, text + stream.push(piece)
    assert text + stream.finish() == tokenizer.decode(ids, skip)
    assert stream.push(ids) + stream.finish() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=200)
@given(before=IDS, ids=IDS, skip=st.booleans())
def test_what_follows_other_tokens_is_the_rest_of_the_library_s_text(name, before, ids, skip):
    # tokenizers 0.23.3, as transformers and vLLM call it: decode(prompt + completion)[len(decode(prompt)) :].
    tokenizer = TOKENIZERS[name]
    whole, start = (tokenizer.backend.decode(of, skip_special_tokens=skip) for of in (before + ids, before))
    stream = tokenizer.stream(skip, after=before)
    assert stream.push(ids) + stream.finish() == whole[len(start) :]
    assert "".join(map(stream.push, ([i] for i in ids))) + stream.finish() == whole[len(start) :]


A, B_C, THE, SPACES = (PIECES.index(word) for word in ("a", "b▁c", "▁the", "▁▁"))
BOS, NOTHING = len(PIECES), 10**5


@pytest.mark.parametrize(
    ("name", "before", "ids", "text"),
    [
        ("Llama 2", [A], [THE, THE], " the the"),
        ("Llama 2", [BOS, THE], [SPACES, A], "  a"),
        ("Llama 2", [BOS], [THE, THE], "the the"),  # there is no text before it
        ("Llama 2", [BOS, NOTHING, PIECES.index("▁")], [THE], " the"),  # the first space is taken off already
        ("Llama 2", [1 + 0xC3], [THE], " the"),  # half a character is text
        ("Llama 2", [A, 1 + 0xC3], [1 + 0xA9, THE], "\ufffd the"),  # it stays half a character
        ("Gemma", [BOS], [THE], " the"),
        ("strip two", [PIECES.index("▁")], [SPACES, A], " a"),
        ("strip two", [B_C], [SPACES, A], "  a"),
        ("metaspace always", [B_C], [THE, THE], " the the"),
        ("metaspace first", [BOS, A], [SPACES, THE], "   the"),
        ("metaspace first", [BOS, NOTHING], [THE, THE], "the the"),
        ("metaspace never", [A], [THE], " the"),
    ],
)
def test_a_completion_is_not_the_start_of_a_text(name, before, ids, text):
    stream = TOKENIZERS[name].stream(after=before)
    for _ in range(2):  # the second time it starts where it started
        assert stream.push(ids) + stream.finish() == text


def test_special_tokens_that_are_shown_are_text():
    stream = TOKENIZERS["Llama 2"].stream(skip_special=False, after=[BOS])
    assert stream.push([THE]) == " the"


@pytest.mark.parametrize("name", SHAPES)
def test_one_token_alone_is_as_it_stands_inside_a_text(name):
    texts = [TOKENIZERS[name].decode_token(i) for i in (THE, SPACES, A, B_C, BOS, NOTHING)]
    assert texts == [" the", "  ", "a", "b c", "<s>", ""]


def test_the_first_token_is_the_first_that_stands_for_something():
    ids = [10**5, len(PIECES), PIECES.index("▁the"), PIECES.index("▁the")]
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def test_a_character_of_byte_tokens_comes_out_whole_and_at_once():
    stream = TOKENIZERS["Llama 2"].stream()
    assert [stream.push([1 + byte]) for byte in "\né👋".encode()] == ["\n", "", "é", "", "", "", "👋"]


def test_each_byte_that_is_in_no_character_is_one_replacement_and_takes_nothing_back():
    # Where a run of bytes holds characters as well, `tokenizers` gives them up; they have been streamed by then.
    tokenizer, run = TOKENIZERS["Gemma"], [1 + byte for byte in "é".encode() + b"\xf0\x9f\xff"]
    assert tokenizer.decode(run) == "é" + 3 * "\ufffd"
    assert tokenizer.backend.decode(run) == 5 * "\ufffd"


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "none"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (FUSE, "Fuse"),
        (decoders.Sequence([SPACE, decoders.Strip(" ", 1, 0)]), "Replace + Strip"),
        (decoders.Sequence([SPACE, FUSE, decoders.Strip(" ", 1, 1)]), "Replace + Fuse + Strip"),
        (decoders.Sequence([decoders.Replace("ab", " "), FALLBACK]), "Replace + ByteFallback"),
        (decoders.Sequence([decoders.ByteLevel(), FUSE]), "ByteLevel + Fuse"),
    ],
)
def test_other_decoders_are_refused_by_name(decoder, name):
    backend = Backend(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(CheckpointError, match=f"decoder \\({name.replace('+', '.')}\\) is not supported") as caught:
        Tokenizer(backend, SpecialTokens())
    assert "ByteLevel, Metaspace" in str(caught.value)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_files_encode_as_the_library_does_and_back(tiny_spm, scheme):
    vocab = {token: i for i, token in enumerate(tiny_spm["tokenizer.ggml.tokens"])}
    backend = Backend(models.BPE(vocab, [], unk_token="<0-unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([SPACE, FALLBACK, FUSE, *strip])
    backend.normalizer = normalizers.Sequence([])
    tokenizer = Tokenizer(backend, SpecialTokens())
    for text in awkward_texts():
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids)
