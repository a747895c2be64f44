"""One peer's turn in `offline.py`: the same workload through transformers or vLLM, in the peer's own Python.

    PEER_PYTHON scripts/bench/peer.py --engine transformers --model DIRECTORY --workload FILE --dtype float32

Needs nothing of Twinmesh, runs on Python 3.10 and newer, and prints one line of JSON: seconds for the whole workload,
tokens as asked for, and the tokens themselves. `--engine save` makes a Hugging Face directory of a GGUF file, for which
transformers wants gguf and accelerate beside it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Run one engine over the workload, print its figures and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["transformers", "vllm", "save"], required=True)
    parser.add_argument("--model", required=True, help="a Hugging Face directory; a GGUF file for 'save'")
    parser.add_argument("--workload", required=True, help="what offline.py wrote; for 'save' the new directory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=32, help="of transformers, which has no continuous batching")
    args = parser.parse_args()
    if args.engine == "save":
        save(Path(args.model), args.workload)
        return 0
    work = json.loads(Path(args.workload).read_text())
    print(json.dumps(with_transformers(args, work) if args.engine == "transformers" else with_vllm(args, work)))
    return 0


def save(gguf: Path, directory: str) -> None:
    """Write a GGUF file's weights, dequantised to float32, as a Hugging Face directory."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = model.config
    if hasattr(config, "quantization_config"):  # what is written is not quantised, and save_pretrained would refuse
        del config.quantization_config
    config.save_pretrained(directory)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})


def with_transformers(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """Run `generate` over batches padded on the left, with requests sorted by length to waste little on padding."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    requests = work["requests"]
    order = sorted(range(len(requests)), key=lambda i: (requests[i]["tokens"], len(requests[i]["prompt"])))
    outputs: list[list[int]] = [[]] * len(requests)

    def generate(batch: list[int]) -> None:
        longest = max(len(requests[i]["prompt"]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # [B, T]
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            prompt = requests[i]["prompt"]
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        most = max(requests[i]["tokens"] for i in batch)
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=most, max_new_tokens=most, pad_token_id=0
            )
        for row, i in enumerate(batch):
            outputs[i] = found[row, longest : longest + requests[i]["tokens"]].tolist()

    generate(order[:2])  # warm
    start = time.perf_counter()
    for first in range(0, len(order), args.batch_size):
        generate(order[first : first + args.batch_size])
    seconds = time.perf_counter() - start
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"seconds": seconds, "outputs": outputs, "version": version, "batch_size": args.batch_size}


def with_vllm(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """Run all requests at once, as suits its own batching; no prefix cache, no text."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    import vllm

    llm = vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=work["max_model_len"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": request["prompt"]} for request in work["requests"]]
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
        for request in work["requests"]
    ]
    llm.generate(prompts[:2], params[:2], use_tqdm=False)  # warm
    start = time.perf_counter()
    found = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    outputs = [list(output.outputs[0].token_ids) for output in found]
    return {"seconds": seconds, "outputs": outputs, "version": f"vllm {vllm.__version__}"}


if __name__ == "__main__":
    sys.exit(main())
