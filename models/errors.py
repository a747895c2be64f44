"""Errors about a model and its files; every message is one sentence that names the file and the culprit."""


class ModelError(ValueError):
    """An error about a model, as opposed to a request: base of the errors below."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be read, is damaged, or needs something that is not implemented."""


class ChatTemplateError(ModelError):
    """A model without a chat template, a template that fails, or messages that it cannot take."""
