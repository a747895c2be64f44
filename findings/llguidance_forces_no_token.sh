#!/usr/bin/env bash
# llguidance 1.9.1: `compute_ff_tokens` is empty where the next character is forced, as soon as several tokens begin with it: which of
# them a model would take is open. A vocabulary with a token more can so have no forced token. `compute_ff_bytes` names the character.
#
# Seen on 2026-11-29:
#   as found: bytes alone: (['{'], b'{')
#   as found: with a token for brace and quote as well: ([], b'{')
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare llguidance==1.9.1 tokenizers==0.23.3 -- "$@"
run_python <<'PY'
import json

from finding import expect
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}


def forced(merges):
    """Forced tokens and bytes at the start of an object, for bytes and these merges."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<eos>"])
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<eos>")), grammar)
    return [tokenizer.id_to_token(i) for i in matcher.compute_ff_tokens()], matcher.compute_ff_bytes()


plain, merged = forced([]), forced([("{", '"')])
expect(plain == (["{"], b"{"), f"bytes alone: {plain}")
expect(merged == ([], b"{"), f"with a token for brace and quote as well: {merged}")
PY
