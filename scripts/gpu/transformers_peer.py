"""Measures Hugging Face transformers on the same steps, for `gpu_suite.py`: Qwen3-8B's shapes, random bfloat16 weights.

A decode step's time is that of each further token of `generate`, greedy, with its default cache: the time of NEW + 1
tokens less the time of one, over NEW. Prefill is one call on a prompt for its last token's logits. If torch or
transformers is missing, the figures are null and the reason is given. No JAX, as torch uses the device.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from twinmesh.scripts.gpu.facts import Facts

CONTEXT, PROMPT, BATCHES, NEW = 1024, 8192, (1, 8, 32), 24


def transformers(scale: float) -> Iterator[Facts]:
    """Measure the milliseconds of decode steps and of a prompt."""
    try:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        yield {"decode": None, "prefill": None, "reason": f"{type(error).__name__}: {error}"}
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and scale == 1:
        yield {"decode": None, "prefill": None, "reason": "torch sees no GPU"}
        return
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device), torch.inference_mode():
        model = Qwen3ForCausalLM(Qwen3Config(**_sizes(scale))).eval()
        yield from _measure(model, scale)


def _sizes(scale: float) -> Facts:
    """Return the configuration's arguments, with fewer layers and a smaller vocabulary to try the suite quickly."""
    small = scale < 1
    return {
        "vocab_size": 1024 if small else 151936,
        "hidden_size": 256 if small else 4096,
        "intermediate_size": 256 if small else 12288,
        "num_hidden_layers": 1 if small else 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _measure(model: Any, scale: float) -> Iterator[Facts]:
    import torch
    from transformers import __version__

    yield {"version": __version__, "torch": torch.__version__}
    vocabulary = model.config.vocab_size
    context, prompt = max(16, int(CONTEXT * scale)), max(16, int(PROMPT * scale))
    for rows in BATCHES:
        ids = torch.randint(0, vocabulary, (rows, context))

        def generate(count: int, ids: Any = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
            )

        first, all_ = (seconds(lambda count=count: generate(count)) for count in (1, NEW + 1))  # type: ignore[misc]
        yield {"decode": {str(rows): {"ms": 1e3 * (all_ - first) / NEW}}}
    ids = torch.randint(0, vocabulary, (1, prompt))
    yield {"prefill": {"tokens": prompt, "ms": 1e3 * seconds(lambda: model(ids, logits_to_keep=1))}}


def seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    """Measure the shortest of several calls, after one that warms up."""
    import torch

    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
