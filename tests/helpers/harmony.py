"""A tokenizer with the vocabulary of GPT-OSS, and a small one with its markers."""

import base64
import json
import re
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import ByteLevel
from twinmesh.models.text.byte_decoder import byte_decoder
from twinmesh.models.text.tokenizer import SpecialTokens, Tokenizer

# npm's package that has the ranks of o200k_base.
PACKAGE = Path(__file__).resolve().parents[2] / ".venv" / "js-tiktoken-1.0.21.tgz"
RANKS = "package/dist/ranks/o200k_base.cjs"
SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>", "<|constrain|>",
    "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|reserved_200009|>",
    "<|reserved_200010|>", "<|reserved_200011|>", "<|call|>",
)  # fmt: skip


def with_markers(vocab):
    """A byte-level tokenizer over `vocab`, with GPT-OSS's special tokens behind it; it merges nothing."""
    backend = BackendTokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    end = backend.token_to_id("<|return|>")
    return Tokenizer(backend, SpecialTokens(eos="<|return|>", eos_token_ids=frozenset({end})))


@cache
def byte_tokenizer():
    """GPT-OSS's markers over the 256 bytes."""
    return with_markers({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))})


@cache
def o200k_tokenizer():
    """The vocabulary of GPT-OSS; skips the test where npm cannot bring the package that has it."""
    if not PACKAGE.exists():
        npm = shutil.which("npm") or pytest.skip("there is no npm")
        command = [npm, "pack", "js-tiktoken@1.0.21", "--pack-destination", str(PACKAGE.parent)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"npm does not bring {PACKAGE.name}")
    letters = {byte: letter for letter in ByteLevel.alphabet() for byte in _bytes(letter)}
    with tarfile.open(PACKAGE) as package:
        source = package.extractfile(RANKS).read().decode()
    lines = json.loads(re.search(r'"bpe_ranks":\s*("(?:[^"\\]|\\.)*")', source)[1]).splitlines()
    vocab = {}
    for line in filter(None, lines):
        _, start, *tokens = line.split(" ")
        for rank, token in enumerate(tokens, int(start)):
            vocab["".join(map(letters.__getitem__, base64.b64decode(token)))] = rank
    return with_markers(vocab)


def _bytes(letter):
    return byte_decoder(decoders.ByteLevel()).token_bytes(letter)
