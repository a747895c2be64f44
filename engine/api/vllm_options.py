"""What vLLM's engine arguments become here: options of `EngineOptions`, nothing, or an error. No JAX.

Three kinds are taken. What has a meaning here is translated (`_TRANSLATED`). What says how vLLM is deployed and changes
neither answers nor memory here is left out, and named once in a debug line of the logger "twinmesh" (`IGNORED`). What
would make vLLM faster, and answers the same, is left out with a warning of that logger that says what to write instead
(`_SPEED_ONLY`). Arguments that are None or False ask for nothing. All others stay, and the engine refuses them with
what `vllm_tables.py` says.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..config import GpuShare, check_fraction, check_whole_number
from ..options import documentation
from .vllm_tables import ENGINE, IGNORED

_LOG = logging.getLogger("twinmesh")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHUNKS = (64, 256, 512, 2048)  # sizes of prefill steps below the largest
_LARGEST_CHUNK = 8192  # tokens of a step, as on a large GPU
# Connectors that keep KV outside of an engine, to be used again by another: a cache.
_CACHES = _words(
    "ExampleConnector SharedStorageConnector LMCacheConnectorV1 LMCacheMPConnector FlexKVConnectorV1 "
    "OffloadingConnector SimpleCPUOffloadConnector"
)
# Values that say no more than what is so anyway.
_SAME: Mapping[str, tuple[object, ...]] = {
    "generation_config": ("auto", "vllm"),
    # A checkpoint's own files say how its weights are stored; "dummy" alone asks for something else.
    "load_format": ("auto", "hf", "safetensors", "fastsafetensors", "pt", "gguf", "sharded_state", "mistral"),
    "tokenizer_mode": ("auto", "slow", "fast", "hf"),
    "runner": ("auto", "generate", "pooling"),
    "convert": ("auto", "none", "embed"),
    "task": ("auto", "generate", "embed"),
    "distributed_executor_backend": ("mp", "ray", "uni"),
    "device": ("auto",),
    "pipeline_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "cpu_offload_gb": (0,),
    "kv_offloading_size": (0,),
    "preemption_mode": ("recompute",),
    "scheduling_policy": ("priority",),  # requests have a priority under every policy
    "logits_processors": ([], ()),
    "limit_mm_per_prompt": ({},),
    "additional_config": ({},),
}
_SPEED_ONLY = _words("speculative_config speculative_model num_speculative_tokens kv_offloading_backend")
_OWN_CACHE = (
    "leave it out: prompts stay cached in the engine (enable_prefix_caching), so ask one engine for all; "
    "topology='prefill=1,decode=1' keeps the phases apart in it"
)


def adapt(engine: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the keyword arguments of an `engine` ("LLM") into options; what is neither stays as it is.

    Raises:
        ValueError: a value that cannot be had, or an argument beside the option that it would set.
    """
    options = {name: value for name, value in given.items() if name not in ENGINE}
    asked = {name: value for name, value in given.items() if name in ENGINE and not _asks_nothing(value)}
    if len(given) > len(documentation()):  # as `EngineArgs` gives them; nobody writes so many by hand
        options = {name: value for name, value in options.items() if value is not None}
    ignored = [name for name in asked if name in IGNORED]
    same = [name for name, value in asked.items() if value in _SAME.get(name, ())]
    lost = [name for name, value in asked.items() if _is_speed_only(name, value) or _is_cache(name, value)]
    left = {name: value for name, value in asked.items() if name not in {*ignored, *same, *lost}}
    for name in [name for name in left if name in _TRANSLATED]:
        if name in left:  # not taken together with another
            _TRANSLATED[name](options, left, left[name])
            left.pop(name, None)
    _normalise(options)
    if ignored:
        _LOG.debug("%s: vLLM's %s mean nothing here, and were left out", engine, ", ".join(sorted(ignored)))
    for name in sorted(lost):
        instead = _OWN_CACHE if name == "kv_transfer_config" else ENGINE[name]
        _LOG.warning(
            "%s: %s would make vLLM faster and change no answer; here it does nothing: %s.", engine, name, instead
        )
    return {**options, **left}


def _asks_nothing(value: object) -> bool:
    return value is None or value is False


def _is_speed_only(name: str, value: object) -> bool:
    """Whether an argument can change how fast answers come and nothing else."""
    hidden = isinstance(value, Mapping) and value.get("method") == "extract_hidden_states"  # no draft, but an output
    return name in _SPEED_ONLY and not hidden


def _is_cache(name: str, value: object) -> bool:
    """Whether an argument asks to share KV with engines that run later or elsewhere, as a cache does."""
    if name != "kv_transfer_config" or not isinstance(value, Mapping):
        return False
    return value.get("kv_connector") in _CACHES and not value.get("kv_connector_module_path")


def _set(options: dict[str, Any], name: str, value: object, why: str) -> None:
    if options.get(name) not in (None, value):
        raise ValueError(f"{why} would set {name}={value!r}, and {name}={options[name]!r} is given: leave one out.")
    options[name] = value


def _memory(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    check_fraction("gpu_memory_utilization", value)
    _set(options, "memory_fraction", GpuShare(value), "gpu_memory_utilization")


def _parallel(options: dict[str, Any], left: dict[str, Any], _: object) -> None:
    """Make a topology of what vLLM says with up to three arguments."""
    sizes = {name: left.pop(name, 1) for name in ("tensor_parallel_size", "data_parallel_size")}
    for name, size in sizes.items():
        check_whole_number(name, size, 1)
    tp, dp = sizes.values()
    experts = f"ep{tp}" if left.pop("enable_expert_parallel", False) and tp > 1 else ""
    if (tp, dp) != (1, 1):
        topology = f"both={dp}" + (f"xtp{tp}{experts}" if tp > 1 else "")
        _set(options, "topology", topology, "tensor_parallel_size or data_parallel_size")


def _chunk(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    check_whole_number("max_num_batched_tokens", value, 1)
    largest = min(value, _LARGEST_CHUNK)
    smaller = () if options.get("deterministic") else tuple(size for size in _CHUNKS if size < largest)
    _set(options, "prefill_buckets", (*smaller, largest), "max_num_batched_tokens")


def _page(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    check_whole_number("block_size", value, 1)
    _set(options, "page_size", value, "block_size")


def _bytes(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    check_whole_number("kv_cache_memory_bytes", value, 1)
    _set(options, "kv_cache_bytes", value, "kv_cache_memory_bytes")


def _order(options: dict[str, Any], left: dict[str, Any], value: Any) -> None:
    _set(options, "policy", value, "scheduling_policy")


def _tqdm(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    _set(options, "progress", bool(value), "use_tqdm_on_load")


def _profiler(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    folder = value.get("torch_profiler_dir") if isinstance(value, Mapping) else None
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"profiler_config={value!r} is not usable: give {{'torch_profiler_dir': folder}}.")
    _set(options, "profile_dir", folder, "profiler_config")


def _revision(options: dict[str, Any], _: dict[str, Any], value: Any) -> None:
    if value == "main":
        return
    name, own = (*str(options.get("model")).split("@", 1), "")[:2]
    if own not in ("", str(value)):
        raise ValueError(f"model names the revision {own!r}, and revision={value!r} is given: leave one of them out.")
    options["model"] = f"{name}@{value}"


def _tokenizer(options: dict[str, Any], left: dict[str, Any], value: Any) -> None:
    if value != options.get("model"):
        raise ValueError(
            f"tokenizer={value!r} is not the model {options.get('model')!r}: leave it out, the tokenizer is the one in "
            "the model's files."
        )


_TRANSLATED: Mapping[str, Callable[[dict[str, Any], dict[str, Any], Any], None]] = {
    "gpu_memory_utilization": _memory,
    "tensor_parallel_size": _parallel,
    "data_parallel_size": _parallel,
    "enable_expert_parallel": _parallel,
    "max_num_batched_tokens": _chunk,
    "block_size": _page,
    "kv_cache_memory_bytes": _bytes,
    "scheduling_policy": _order,
    "use_tqdm_on_load": _tqdm,
    "profiler_config": _profiler,
    "revision": _revision,
    "tokenizer": _tokenizer,
}
TAKEN = frozenset({*IGNORED, *_SPEED_ONLY, *_TRANSLATED})  # whatever their values are


def _normalise(options: dict[str, Any]) -> None:
    """Put vLLM's spellings of values that both have into ours."""
    if options.get("max_model_len") in (-1, "auto"):
        del options["max_model_len"]
    spelled = {"fp8_e4m3": "fp8", "half": "float16", "float": "float32"}
    for name in ("kv_cache_dtype", "dtype"):
        if isinstance(options.get(name), str):
            options[name] = spelled.get(options[name], options[name])
