"""Reads chat templates from the files of a Hugging Face directory or from GGUF metadata, and writes such files.

In a directory, newer formats take precedence, as in transformers: chat_template.jinja (with further ones in
additional_chat_templates/), then chat_template.json, then "chat_template" in tokenizer_config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ChatTemplateError, CheckpointError
from ..json_file import read_json
from .chat import ChatTemplate, Source
from .tokenizer import Tokenizer

_FILE = "chat_template.jinja"
_MORE = "additional_chat_templates"


def chat_template_from_directory(path: str | Path, tokenizer: Tokenizer, *, name: str) -> ChatTemplate:
    """Read the template in the directory `path`; `name` is the model's, for messages.

    A directory without one gives a template that refuses to render.

    Raises:
        CheckpointError: a file that cannot be read or is damaged; names the file.
    """
    path = Path(path)
    try:
        source: Source = {
            ("default" if file.name == _FILE else file.stem): file.read_text(encoding="utf-8")
            for file in [*path.glob(_FILE), *sorted((path / _MORE).glob("*.jinja"))]
        }
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_FILE} cannot be read: {error}.") from None
    for file in ("chat_template.json", "tokenizer_config.json"):
        if not source and (path / file).exists():
            source = read_json(path / file).get("chat_template")
    try:
        return ChatTemplate(source, tokenizer, name=name)
    except ChatTemplateError as error:
        raise CheckpointError(f"{path}: {error}") from None


def templates_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Read templates by name: "default" from `tokenizer.chat_template`, NAME from `tokenizer.chat_template.NAME`."""
    key = "tokenizer.chat_template"
    found = {k.removeprefix(f"{key}."): v for k, v in metadata.items() if k.startswith(f"{key}.")}
    if key in metadata:
        found["default"] = metadata[key]
    return {name: text for name, text in found.items() if isinstance(text, str)}


def save_chat_template(template: ChatTemplate, directory: Path) -> None:
    """Write the files that `chat_template_from_directory` reads; none if there is no template."""
    for name, text in template.templates.items():
        file = directory / _FILE if name == "default" else directory / _MORE / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
