"""Conversations in and answers out, as far as they depend on the format on which a model was tuned.

`chat_format.py` turns a conversation into a prompt: by the model's own template, or in OpenAI's harmony format.
`answers.py` says what an answer is read into and what reads it; each format has a reader in a file of its own. The
engine is not known here: it gets token ids and gives token ids.
"""
