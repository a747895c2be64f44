#!/usr/bin/env bash
# openai-harmony 0.0.8: reasoning of earlier turns is to be dropped from the prompt, and `auto_drop_analysis`, which is on unless it
# is switched off, sounds as if it did that. It drops what stands before the first answer in the channel "final", and only where the
# last message of the assistant's is such an answer: of two finished turns the reasoning of the second stays, and while a tool is
# being called that of every turn does. GPT-OSS's own template leaves out both.
#
# Seen on 2026-11-30:
#   as found: reasoning in the prompt after finished turns: {1: [], 2: ['Second thought.']}
#   as found: and while a third one calls a tool: ['First thought.', 'Second thought.', 'Third thought.']
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare openai-harmony==0.0.8 -- "$@"
fetch_o200k
run_python <<'PY'
import re

from finding import expect
from openai_harmony import Author, Conversation, Message, Role, load_harmony_encoding

encoding = load_harmony_encoding("HarmonyGptOss")
asked = Message.from_role_and_content(Role.USER, "Asked.")


def said(text, channel):
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def kept(*messages):
    """The reasoning that is in the prompt for the next answer."""
    conversation = Conversation.from_messages(list(messages))
    prompt = encoding.decode(encoding.render_conversation_for_completion(conversation, Role.ASSISTANT))
    return re.findall(r"analysis<\|message\|>(.*?)<\|end\|>", prompt)


one = [asked, said("First thought.", "analysis"), said("First answer.", "final")]
two = [asked, said("Second thought.", "analysis"), said("Second answer.", "final")]
call = said("{}", "commentary").with_recipient("functions.f")
result = Message.from_author_and_content(Author.new(Role.TOOL, "functions.f"), "1").with_channel("commentary")
three = [asked, said("Third thought.", "analysis"), call, result.with_recipient("assistant")]
after = {turns: kept(*messages, asked) for turns, messages in ((1, one), (2, one + two))}
expect(after == {1: [], 2: ["Second thought."]}, f"reasoning in the prompt after finished turns: {after}")
during = kept(*one, *two, *three)
expect(
    during == ["First thought.", "Second thought.", "Third thought."], f"and while a third one calls a tool: {during}"
)
PY
