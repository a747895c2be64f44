"""`twinmesh generate`: one prompt in, its completion on stdout as it is generated; everything else on stderr.

`python scripts/generate.py` is the same command; the imports are absolute because a file run that way has no package.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.scripts import arguments, report, sampling_arguments

if TYPE_CHECKING:
    from twinmesh.engine.api.sampling_params import SamplingParams
    from twinmesh.engine.startup.one_request import OneRequest
    from twinmesh.models.checkpoints.base import Checkpoint
    from twinmesh.models.text.chat import ChatOptions

SUMMARY = "complete one prompt, streaming the answer to stdout"
DESCRIPTION = """\
Complete one prompt. The answer streams to stdout as it is generated; progress and figures go to stderr.

  twinmesh generate --model smollm2 --chat --prompt "What is the capital of France?"
  echo "Once upon a time" | twinmesh generate --model smollm2 --max-tokens 40
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from stdin)")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt to the model as a user's message, in its chat template"
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="with --chat: a Jinja template in the place of the model's"
    )
    sampling_arguments.add_template_variables(parser, "with --chat")
    arguments.add_engine_arguments(parser)
    sampling_arguments.add_sampling_arguments(parser, max_tokens=256, temperature=0.0, which="how tokens are chosen")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    params = sampling_arguments.sampling_params(args)
    arguments.check_written(args, ("decision_log",))
    options = _chat_options(args)
    prompt = _read_prompt(args.prompt)
    with arguments.load_llm(args, lambda checkpoint: _request(args, checkpoint, prompt, options, params)) as llm:
        stream = llm.stream(llm.chat_prompt(_messages(prompt), **options) if args.chat else prompt, params)
        for delta in stream:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        output = stream.result()
    print(flush=True)
    if output.error is not None:
        print(f"twinmesh: {output.error}", file=sys.stderr)
        return 1
    print(report.one_line(output), file=sys.stderr)
    return 0


def _chat_options(args: argparse.Namespace) -> "ChatOptions":
    """Return how the prompt becomes a conversation's text.

    Raises:
        ValueError: options of a chat without --chat, or a template that cannot be read.
    """
    options: ChatOptions = {}
    if not args.chat and (args.chat_template is not None or args.chat_template_kwargs is not None):
        raise ValueError("--chat-template and --chat-template-kwargs are for conversations: add --chat.")
    if args.chat_template_kwargs is not None:
        options["chat_template_kwargs"] = args.chat_template_kwargs
    if args.chat_template is not None:
        try:
            options["chat_template"] = Path(args.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"--chat-template: {args.chat_template} cannot be read: {error}.") from None
    return options


def _request(
    args: argparse.Namespace, checkpoint: "Checkpoint", prompt: str, options: "ChatOptions", params: "SamplingParams"
) -> "OneRequest":
    """Describe the request, for an engine that is started for it alone; the weights are not loaded yet.

    Raises:
        ValueError: the prompt is too long, or parameters do not go with the model.
    """
    from twinmesh.engine.api.prompts import check_prompt
    from twinmesh.engine.api.resolve_sampling import resolve
    from twinmesh.engine.chat.chat_format import ChatFormat
    from twinmesh.engine.startup.one_request import OneRequest

    asked, longest, tokenizer = args.max_model_len, checkpoint.config.max_position, checkpoint.tokenizer()
    chat = ChatFormat(tokenizer, checkpoint.chat_template())
    ids = chat.encode(_messages(prompt), **options) if args.chat else prompt
    checked = check_prompt(ids, tokenizer, longest if asked is None else min(asked, longest))
    return OneRequest(len(checked.ids), params.max_tokens or longest, resolve(params, tokenizer, seed=0))


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _read_prompt(given: str | None) -> str:
    """Read the prompt from the command line, or all of stdin but the line end that `echo` adds."""
    if given is None:
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D on a line of its own.", file=sys.stderr)
        try:
            given = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError:
            raise ValueError("The prompt on stdin is not UTF-8 text: convert it to UTF-8.") from None
    if not given:
        raise ValueError("The prompt is empty: give a text with --prompt, or on stdin.")
    try:
        given.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 reach Python's argv as lone surrogates
        raise ValueError("The prompt is not UTF-8 text: convert it to UTF-8.") from None
    return given


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
