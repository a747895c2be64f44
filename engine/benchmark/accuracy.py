"""Asks an engine questions whose answers are known, so that a report carries a score beside its speed.

`arithmetic.jsonl` has sums, of which a small model has some right, and word problems in the manner of GSM8K, made for
this project: an object a line with `question` and `answer`, a whole number. A prompt is four solved examples and the
question; the answer is greedy, ends at a blank line, and its last number counts. What it is for is to notice that an
engine which has become faster has become wrong, so scores compare with those of the same model and dtype, not with
GSM8K's.
"""

import re
from collections.abc import Sequence
from importlib.resources import files

import msgspec

from ..api.llm import LLM
from ..api.sampling_params import SamplingParams
from ..metrics.benchmark_file import Accuracy

NAME = "arithmetic"
_MOST_TOKENS = 96  # of an answer
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_EXAMPLES = (
    ("Tom has 3 boxes with 4 pens each. How many pens does he have?", "3 boxes x 4 pens = 12 pens. #### 12"),
    ("A book costs 7 dollars. Ann pays with 20 dollars. How much does she get back?", "20 - 7 = 13. #### 13"),
    ("Ben had 9 apples, ate 2 and bought 5. How many has he now?", "9 - 2 = 7, and 7 + 5 = 12. #### 12"),
    ("A train goes 60 km in an hour. How far does it go in 3 hours?", "60 x 3 = 180 km. #### 180"),
)


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question."""

    question: str
    answer: int


def read_items() -> tuple[Item, ...]:
    """Return the questions of the set, in the order of the file."""
    text = files(__package__).joinpath(f"{NAME}.jsonl").read_bytes()
    return tuple(msgspec.json.decode(line, type=Item) for line in text.splitlines())


def prompt_of(item: Item) -> str:
    """Return the prompt of a question, the same for every model."""
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in _EXAMPLES)
    return f"{shots}Question: {item.question}\nAnswer:"


def is_right(item: Item, text: str) -> bool:
    """Return whether an answer ends in the right number: that behind the first "####", else the last of its first
    paragraph."""
    said = text.split("\n\n")[0]
    _, mark, behind = said.partition("####")
    numbers = _NUMBER.findall(behind if mark else said)
    if not numbers:
        return False
    found = numbers[0 if mark else -1].replace(",", "")
    return float(found) == item.answer


def check_room(llm: LLM, items: Sequence[Item]) -> None:
    """Check that an engine has room for every question and its answer.

    Raises:
        ValueError: it has not.
    """
    longest = max(len(llm.tokenizer.encode(prompt_of(item))) for item in items) + _MOST_TOKENS
    if longest > llm.config.max_model_len:
        raise ValueError(
            f"the questions of {NAME} and their answers take {longest} tokens, and the engine has room for "
            f"max_model_len={llm.config.max_model_len}: raise it."
        )


def ask(llm: LLM, items: Sequence[Item]) -> Accuracy:
    """Ask all questions at once.

    Raises:
        ValueError: a prompt is longer than the engine takes.
        EngineError: the engine has ended.
    """
    params = SamplingParams(temperature=0, max_tokens=_MOST_TOKENS, stop=["\n\n"])
    outputs = [one.outputs[0] for one in llm.generate([prompt_of(item) for item in items], params)]
    right = sum(is_right(item, one.text) for item, one in zip(items, outputs, strict=True))
    failed = sum(one.finish_reason not in ("stop", "length") for one in outputs)
    return Accuracy(name=NAME, asked=len(items), right=right, failed=failed)
