"""Write `fixtures/special_tokens.json`: what transformers makes of the directories of helpers/special_cases.py.

Run by a maintainer when a case is added, with a Python that has transformers and tokenizers (it does not import
twinmesh):

    python tests/make_special_fixtures.py

For each case: ids and texts of `TEXTS` without the special tokens, the text of `ABC` alone, and special tokens by name.
"""
# Its packages are not in this project's environment.
# mypy: ignore-errors

import json
import sys
import tempfile
from pathlib import Path

import transformers

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from helpers.special_cases import ABC, CASES, TEXTS, write_special_case  # noqa: E402


def outcome(case):
    """What transformers' tokenizer says of one case."""
    with tempfile.TemporaryDirectory() as directory:
        write_special_case(Path(directory), case)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "abc": tokenizer.decode([ABC], skip_special_tokens=True),
        "names": {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
    }


def main():
    """Write the fixture, a line for each case."""
    cases = ",\n".join(f"{json.dumps(name)}: {json.dumps(outcome(case))}" for name, case in CASES.items())
    content = f'{{"transformers": "{transformers.__version__}", "cases": {{\n{cases}\n}}}}\n'
    (TESTS / "fixtures" / "special_tokens.json").write_text(content)


if __name__ == "__main__":
    main()
