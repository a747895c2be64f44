"""The tokens with which GPT-OSS marks its messages: OpenAI's harmony format.

A vocabulary that has all of them is a harmony one, whatever the model is called. Names and meanings are those of
openai-harmony 0.0.8. What the messages hold is read and written elsewhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

TEXTS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


@dataclass(frozen=True)
class HarmonyTokens:
    """Ids of the markers of one vocabulary."""

    start: int  # a header begins: the author, then the other parts
    channel: int  # the channel's name follows
    constrain: int  # the type of the content follows
    message: int  # the header ends, and the content begins
    end: int  # a message ends, and the model goes on
    return_: int  # the last message ends
    call: int  # a call of a tool ends

    @property
    def ids(self) -> frozenset[int]:
        """Return all of them."""
        return frozenset(astuple(self))

    def ends(self, ids: Iterable[int]) -> frozenset[int]:
        """Correct the ids that are said to end a generation: an answer and a call do, and a message does not."""
        return frozenset(ids) - {self.end} | {self.return_, self.call}


def harmony_tokens(ids: Mapping[str, int]) -> HarmonyTokens | None:
    """Find the markers among special tokens, ids by text; None: it is no harmony vocabulary."""
    return HarmonyTokens(*(ids[text] for text in TEXTS)) if all(text in ids for text in TEXTS) else None
