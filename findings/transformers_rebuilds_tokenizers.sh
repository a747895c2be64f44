#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer builds some tokenizers anew from the class that tokenizer_config.json names and takes only
# vocabulary and merges from tokenizer.json: its pre-tokenizer is dropped, and the ids are others than those of `tokenizers`, which
# reads the same file.
#
# Seen on 2026-11-29:
#   as found: tokenizers splits digits, as tokenizer.json says: [16, 17]
#   as found: so does transformers for PreTrainedTokenizerFast: [16, 17]
#   as found: and not for GPT2Tokenizer: [256]
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare transformers==5.24.0 tokenizers==0.23.3 -- "$@"
run_python <<'PY'
import json
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
from finding import expect
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = tempfile.mkdtemp()
vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"12": 256}
tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(folder + "/tokenizer.json")


def ids(name):
    with open(folder + "/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": name}, file)
    return AutoTokenizer.from_pretrained(folder).encode("12", add_special_tokens=False)


stored = Tokenizer.from_file(folder + "/tokenizer.json").encode("12").ids
plain, rebuilt = ids("PreTrainedTokenizerFast"), ids("GPT2Tokenizer")
expect(stored == [16, 17], f"tokenizers splits digits, as tokenizer.json says: {stored}")
expect(plain == [16, 17], f"so does transformers for PreTrainedTokenizerFast: {plain}")
expect(rebuilt == [256], f"and not for GPT2Tokenizer: {rebuilt}")
PY
