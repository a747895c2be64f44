"""Run a file of requests, and run the same command again: nothing is computed twice."""

import json
import tempfile
from pathlib import Path

from twinmesh import LLM, SamplingParams
from twinmesh.engine import batch

REQUESTS = [
    {"custom_id": "completion", "prompt": "Once upon a time"},
    {"custom_id": "conversation", "messages": [{"role": "user", "content": "What is the capital of Italy?"}]},
    {"custom_id": "mistake", "prompt": ""},
]


def main() -> None:
    """Write the requests, run them twice, and print every result."""
    with (
        tempfile.TemporaryDirectory() as directory,
        LLM("smollm2", max_model_len=128, max_num_seqs=8, prefill_buckets=(64,), decode_buckets=(8,)) as llm,
    ):
        source, target = Path(directory, "requests.jsonl"), Path(directory, "results.jsonl")
        source.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
        defaults = SamplingParams(temperature=0, max_tokens=12)
        for attempt in ("first", "second"):
            result = batch.run(llm, source, target, model="smollm2", defaults=defaults)
            print(f"{attempt} run: {result.succeeded} succeeded, {result.failed} failed, {result.resumed} resumed")
        for line in target.read_text().splitlines():
            entry = json.loads(line)
            print(entry["custom_id"], entry["error"] or entry["response"]["body"]["choices"][0])


if __name__ == "__main__":
    main()
