"""`twinmesh generate`: one prompt in, its completion on stdout as it is generated; everything else on stderr.

`python scripts/generate.py` is the same command; the imports are absolute because a file run that way has no package.
"""

import argparse
import sys

from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.scripts import arguments, report

SUMMARY = "complete one prompt, streaming the answer to stdout"
DESCRIPTION = """\
Complete one prompt. The answer streams to stdout as it is generated; progress and figures go to stderr.

  twinmesh generate --model smollm2 --chat --prompt "What is the capital of France?"
  echo "Once upon a time" | twinmesh generate --model smollm2 --max-tokens 40
"""

# A context that every model has, in tokens.
_SHORT = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from stdin)")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt to the model as a user's message, in its chat template"
    )
    arguments.add_engine_arguments(parser)
    arguments.add_sampling_arguments(parser, max_tokens=256, temperature=0.0, which="how tokens are chosen")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    params = arguments.sampling_params(args)
    arguments.check_written(args, ("decision_log",))
    prompt = _read_prompt(args.prompt)
    _check_length(args, prompt)
    with arguments.load_llm(args) as llm:
        stream = llm.stream(llm.chat_prompt(_messages(prompt)) if args.chat else prompt, params)
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


def _check_length(args: argparse.Namespace, prompt: str) -> None:
    """Refuse a prompt that is too long before weights are loaded and programs compiled; the engine checks it again.

    Raises:
        ValueError: the prompt is too long, or the model's files cannot be used.
    """
    asked = args.max_model_len
    # Of what is most likely short enough, most tokens being several bytes, the files are not opened twice.
    if len(prompt.encode()) < (_SHORT if asked is None else min(asked, _SHORT)):
        return
    from twinmesh.engine.api.prompts import check_prompt
    from twinmesh.models.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(resolve_model(args.model))
    longest = checkpoint.config.max_position
    ids = checkpoint.chat_template().encode(_messages(prompt)) if args.chat else prompt
    check_prompt(ids, checkpoint.tokenizer(), longest if asked is None else min(asked, longest))


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
