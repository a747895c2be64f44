"""The files of one batch run, and the run over them, against an engine that repeats the prompt."""

import json
from dataclasses import dataclass
from pathlib import Path

from helpers.fake_llm import FakeLLM
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.session import run

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=8)


def prompts(count, start=0):
    return [{"prompt": f"{start + i}", "custom_id": f"id{start + i}"} for i in range(count)]


def chat_line(custom_id, text="hi", **body):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


@dataclass(frozen=True)
class BatchFiles:
    """Input, output and a model of a few bytes, in one directory."""

    folder: Path
    input_name: str = "in.jsonl"
    output_name: str = "out.jsonl"

    @property
    def source(self):
        return self.folder / self.input_name

    @property
    def target(self):
        return self.folder / self.output_name

    @property
    def model(self):
        path = self.folder / "tiny.gguf"
        if not path.exists():
            path.write_bytes(b"a model")
        return path

    def write(self, lines):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        self.source.write_text(text, encoding="utf-8")

    def run(self, lines=None, llm=None, *, defaults=DEFAULTS, **options):
        """Run the batch and return its result; `lines` are written to the input first, unless they are None."""
        if lines is not None:
            self.write(lines)
        return run(llm or FakeLLM(), self.source, self.target, model=self.model, defaults=defaults, **options)

    def read(self):
        return [json.loads(line) for line in self.target.read_text(encoding="utf-8").splitlines()]

    def ids(self):
        return [line["custom_id"] for line in self.read()]
