"""What vLLM has and Twinmesh lacks, by vLLM's names, and what to use instead. No JAX here.

Names are those of vLLM's `EngineArgs`, `SamplingParams`, `LLM` and `AsyncLLM` up to 0.32. Names that mean the same in
both are not here. The tables are data for messages, and for the reference; nothing is translated in silence.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping

_NO_CODE = "leave it out: no code of a model is ever run"
_NO_IMAGES = "leave it out: models take text only"
_NO_POOLING = "leave it out: models generate, and `LLM.score` gives log-probabilities of texts"
_LORA = "merge the adapter into the weights first: adapters are not supported yet"
_CHECKPOINT = "leave it out: a checkpoint's own files say how its weights are stored"
_TOKENIZER = "leave it out: the tokenizer is the one in the model's files"
_HUB = "write it into the model's name, as in org/name@revision"
_COMPILED = "leave it out: every program is compiled at start-up, for the sizes in prefill_buckets and decode_buckets"
_PARALLEL = "use topology: both=1xtp2 is one mesh of two devices, prefill=1,decode=1 keeps the phases apart"
_MEMORY = "use memory_fraction, or kv_cache_bytes for an exact size"
_OFFLOAD = "leave it out: weights and KV stay on the devices"
_GRAMMAR = "leave it out: output is not constrained yet; allowed_token_ids, bad_words and logit_bias bound tokens"
_SPECULATION = "leave it out: there is no speculative decoding yet; decode_steps runs several steps at a time"
_LOGS = "leave it out: `LLM.metrics()` has counts and latencies, and decision_log writes a file"
_KERNELS = "leave it out: the kernels are chosen by the device"
_CHUNKS = "use prefill_buckets: the last one is the chunk size, in tokens of a step"
_PROCESS = "leave it out: an engine is one process, which drives all devices of a machine"

ENGINE: Mapping[str, str] = {
    "tensor_parallel_size": _PARALLEL,
    "pipeline_parallel_size": _PARALLEL,
    "data_parallel_size": "use topology, such as both=2 or prefill=2,decode=2",
    "enable_expert_parallel": _PARALLEL,
    "kv_transfer_config": "use topology, such as prefill=1,decode=1",
    "distributed_executor_backend": _PROCESS,
    "worker_cls": _PROCESS,
    "gpu_memory_utilization": _MEMORY,
    "kv_cache_memory_bytes": "use kv_cache_bytes",
    "num_gpu_blocks_override": "use kv_cache_bytes",
    "block_size": "use page_size",
    "kv_cache_dtype": "use dtype: KV has that of the weights",
    "calculate_kv_scales": "use dtype: KV has that of the weights",
    "swap_space": _OFFLOAD,
    "cpu_offload_gb": _OFFLOAD,
    "kv_offloading_size": _OFFLOAD,
    "max_num_batched_tokens": _CHUNKS,
    "enable_chunked_prefill": _CHUNKS,
    "long_prefill_token_threshold": _CHUNKS,
    "max_num_partial_prefills": _CHUNKS,
    "scheduling_policy": "use policy: fcfs, or spf for the shortest prompt first",
    "scheduler_cls": "use policy, which may be an object of your own",
    "async_scheduling": "leave it out: steps are always dispatched ahead",
    "num_scheduler_steps": "use decode_steps",
    "preemption_mode": "leave it out: a request moves to another mesh where one has room, and is computed again else",
    "enforce_eager": _COMPILED,
    "compilation_config": _COMPILED,
    "cuda_graph_sizes": _COMPILED,
    "cudagraph_capture_sizes": _COMPILED,
    "max_seq_len_to_capture": _COMPILED,
    "optimization_level": _COMPILED,
    "disable_custom_all_reduce": _KERNELS,
    "attention_backend": _KERNELS,
    "disable_cascade_attn": _KERNELS,
    "load_format": _CHECKPOINT,
    "config_format": _CHECKPOINT,
    "hf_config_path": _CHECKPOINT,
    "hf_overrides": "leave it out: change the model's config.json",
    "rope_scaling": "leave it out: change the model's config.json",
    "disable_sliding_window": "leave it out: attention windows are the model's",
    "generation_config": "leave it out: the defaults of SamplingParams are its own",
    "override_generation_config": "leave it out: the defaults of SamplingParams are its own",
    "tokenizer": _TOKENIZER,
    "tokenizer_mode": _TOKENIZER,
    "tokenizer_revision": _HUB,
    "skip_tokenizer_init": "leave it out; token ids are prompts, and detokenize=False in SamplingParams makes no text",
    "revision": _HUB,
    "code_revision": _NO_CODE,
    "trust_remote_code": _NO_CODE,
    "download_dir": "set HF_HOME, where the hub's library keeps its files",
    "hf_token": "set HF_TOKEN, which the hub's library reads",
    "served_model_name": "leave it out: an engine has one model",
    "chat_template": "put chat_template.jinja into the model's directory",
    "max_logprobs": "leave it out: logprobs may be 0 to 20",
    "logprobs_mode": "leave it out: log-probabilities are those of the raw logits",
    "logits_processors": "use allowed_token_ids, bad_words and logit_bias of SamplingParams",
    "structured_outputs_config": _GRAMMAR,
    "guided_decoding_backend": _GRAMMAR,
    "reasoning_parser": "leave it out: what a model thinks is part of its text",
    "speculative_config": _SPECULATION,
    "speculative_model": _SPECULATION,
    "num_speculative_tokens": _SPECULATION,
    "enable_lora": _LORA,
    "max_loras": _LORA,
    "max_lora_rank": _LORA,
    "lora_modules": _LORA,
    "limit_mm_per_prompt": _NO_IMAGES,
    "mm_processor_kwargs": _NO_IMAGES,
    "allowed_local_media_path": _NO_IMAGES,
    "task": _NO_POOLING,
    "runner": _NO_POOLING,
    "convert": _NO_POOLING,
    "pooler_config": _NO_POOLING,
    "override_pooler_config": _NO_POOLING,
    "disable_log_stats": _LOGS,
    "disable_log_requests": _LOGS,
    "enable_log_requests": _LOGS,
    "prefix_caching_hash_algo": "leave it out: prefixes are known by blake2b of all their tokens",
    "enable_sleep_mode": "close the engine, and make another one later",
    "model_impl": "leave it out: families have one implementation each",
    "device": "use devices, or set JAX_PLATFORMS",
    "max_parallel_loading_workers": "leave it out: tensors are read one at a time, whatever the model's size",
}
SAMPLING: Mapping[str, str] = {
    "best_of": "use n, and take the completion with the highest cumulative_logprob",
    "use_beam_search": "use n with a temperature: there is no beam search",
    "length_penalty": "use n with a temperature: there is no beam search",
    "early_stopping": "use n with a temperature: there is no beam search",
    "structured_outputs": _GRAMMAR,
    "guided_decoding": _GRAMMAR,
    "logits_processors": "use allowed_token_ids, bad_words and logit_bias",
    "truncate_prompt_tokens": "cut the prompt's token ids: `LLM.get_tokenizer()` makes them",
    "spaces_between_special_tokens": "leave it out: no supported tokenizer adds any",
    "skip_reading_prefix_cache": "use enable_prefix_caching=False of LLM",
    "thinking_token_budget": "use max_tokens, or stop",
    "repetition_detection": "use repetition_penalty, presence_penalty or frequency_penalty",
    "flat_logprobs": "leave it out: log-probabilities are a dict a token",
    "extra_args": "leave it out: there are no plug-ins",
}
GENERATE: Mapping[str, str] = {
    "prompt_token_ids": "give token ids as prompts",
    "lora_request": _LORA,
    "prompt_adapter_request": _LORA,
    "priority": "use policy of LLM",
    "guided_options_request": _GRAMMAR,
    "tokenization_kwargs": "cut or encode the prompt yourself: `get_tokenizer()` has the tokenizer",
    "mm_processor_kwargs": _NO_IMAGES,
    "multi_modal_data": _NO_IMAGES,
    "chat_template_content_format": "leave it out: the template's own form is found out",
    "trace_headers": _LOGS,
    "data_parallel_rank": "leave it out: requests go where they start first",
}


def unknown(what: str, kind: str, name: str, instead: Mapping[str, str], known: Iterable[str]) -> str:
    """Say that `what` lacks an argument: what is to be used instead of vLLM's, or else the nearest that there is."""
    if name in instead:
        return f"{what} has no {kind} {name}, which vLLM has: {instead[name]}."
    close = difflib.get_close_matches(name, list(known), n=1)
    what_to_do = f"the nearest is {close[0]}" if close else f"help({what}) lists them"
    return f"{what} has no {kind} {name}: {what_to_do}."


def names_what_is_missing[**P, R](what: str, instead: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function that is called with an argument that it lacks say what to use instead, in its TypeError.

    `what` is what callers call it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    raise TypeError(unknown(what, "argument", name, instead, known))
            return function(*args, **kwargs)

        return checked

    return decorate


def names_missing_fields[T](instead: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Let a dataclass that is made with a field that it lacks say what to use instead, in its TypeError."""

    def decorate(made: type[T]) -> type[T]:
        setattr(made, "__init__", names_what_is_missing(made.__name__, instead)(made.__init__))  # noqa: B010 (mypy)
        return made

    return decorate


def as_table() -> str:
    """Write the tables in Markdown, for the reference."""
    groups = {"option of `LLM`": ENGINE, "argument of `SamplingParams`": SAMPLING, "argument of `generate`": GENERATE}
    parts = []
    for title, names in groups.items():
        rows = [f"| `{name}` | {instead} |" for name, instead in sorted(names.items())]
        parts.append("\n".join([f"| vLLM's {title} | here |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
