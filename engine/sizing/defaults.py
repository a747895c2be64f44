"""What an engine gets where its options do not say: one row of numbers for each kind of device.

A GPU works through thousands of tokens in the time in which it reads the weights once, a CPU through a few: on an H100
a chunk of 512 tokens is bound by the weights, and 32 running requests leave it idle. `TABLE` is the one place with such
numbers, and the documentation's table is made from it. Pure functions of platform, device kind and options: nothing
here touches a device or its memory (`startup/memory.py`, `startup/gpu_memory.py`). No JAX here.
"""

import re
from dataclasses import dataclass

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..kv_dtypes import KVDtypes, parse_kv_dtypes, same_everywhere
from ..roles import starting_roles
from .asked import Asked
from .cache_groups import groups

# Prompts that one prefill step packs: so many that they fill the chunk if each brings as many tokens as this.
_TOKENS_PER_PROMPT = 128
_FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class Defaults:
    """The defaults on one kind of device."""

    name: str  # for the documentation
    max_num_seqs: int
    prefill_buckets: tuple[int, ...]
    deterministic_chunk: int  # the only prefill bucket there, to which a prompt of any length is padded
    decode_buckets: tuple[int, ...]  # below max_num_seqs
    staging_part: int  # hand-offs on their way get this part of the KV memory: 8 is an eighth
    has_kernels: bool = False  # whether products of one 16-bit row are as fast as they should be


# While a step costs what reading the weights costs, up to some 256 tokens and 32 rows cost what one does; above, each
# bucket is twice the one before, so that at most half of a step is padding.
_GPU_ROWS = (8, 32, 64, 128, 256, 512, 1024)
_LARGE = Defaults("H100, H200, GH200, B200 and the like", 256, (256, 512, 1024, 2048, 4096, 8192), 2048, _GPU_ROWS, 16)
_GPU = Defaults("other GPUs", 128, (256, 512, 1024, 2048), 2048, _GPU_ROWS, 16)
_CPU = Defaults("CPUs", 32, (64, 256, 512), 512, (1, 8, 32, 128), 8)
TABLE = (_CPU, _LARGE, _GPU)

# Hopper and Blackwell in data centres; cards for desktops have no letter.
_LARGE_KINDS = re.compile(r"\bG?[HB]\d{2,3}\b")


def defaults_for(platform: str, kind: str) -> Defaults:
    """Return the defaults on devices of this platform and kind, both as JAX names them."""
    if platform == "cpu":
        return _CPU
    return _LARGE if _LARGE_KINDS.search(kind) else _GPU


def compile_threads(cores: int) -> int:
    """Return how many programs are compiled at the same time on a host with so many cores.

    XLA compiles a program mostly in one thread, without the GIL; a second one uses what is left on two cores.
    """
    return max(2, min(cores // 2, 16))


def engine_config(options: Asked, model: ModelConfig, defaults: Defaults, dtype: str) -> EngineConfig:
    """Fill the gaps that the options leave, and check lengths, buckets and modes.

    `max_model_len` is the model's for now where none was asked for: memory decides later.

    Raises:
        ValueError: one of them is not usable; names it.
    """
    asked, slots = options.max_model_len, _slots(options, defaults)
    prefill_buckets = _prefill_buckets(options, defaults)
    config = EngineConfig(
        topology=options.parsed_topology,
        max_model_len=model.max_position if asked is None else asked,
        page_size=options.page_size,
        max_num_seqs=slots,
        prefill_buckets=prefill_buckets,
        prefill_rows=_prefill_rows(prefill_buckets),
        decode_buckets=_decode_buckets(options, defaults, slots, dtype),
        dtype=dtype,
        kv=_kv_dtypes(options, dtype),
        windows=tuple(group.window for group in groups(model)),
        decode_steps=options.decode_steps,
        prefix_cache=options.enable_prefix_caching,
        deterministic=options.deterministic,
        max_retries=options.max_retries,
        slo=options.slo,
        roles=starting_roles(options.roles, options.parsed_topology),
        age_seconds=options.age_seconds,
        max_waiting=options.max_waiting,
        max_waiting_tokens=options.max_waiting_tokens,
        logprobs_mode=options.logprobs_mode,
        max_logprobs=model.vocab_size if options.max_logprobs == -1 else min(options.max_logprobs, model.vocab_size),
    )
    if config.max_model_len > model.max_position:
        raise ValueError(
            f"max_model_len={asked} is more than the model's context of {model.max_position} tokens: lower it."
        )
    return config


def _kv_dtypes(options: Asked, dtype: str) -> KVDtypes | None:
    asked = parse_kv_dtypes(options.kv_cache_dtype, dtype, options.parsed_topology)
    return None if asked == same_everywhere(dtype) else asked


def _slots(options: Asked, defaults: Defaults) -> int:
    """Return what was asked for, else the default, or fewer where the decode buckets that were asked for hold fewer."""
    if options.max_num_seqs is not None:
        return options.max_num_seqs
    buckets = options.decode_buckets
    if isinstance(buckets, tuple) and buckets and type(buckets[-1]) is int and buckets[-1] > 0:
        return min(defaults.max_num_seqs, buckets[-1])
    return defaults.max_num_seqs  # buckets that are not usable are refused by `EngineConfig`


def _prefill_buckets(options: Asked, defaults: Defaults) -> tuple[int, ...]:
    if options.prefill_buckets is not None:
        return options.prefill_buckets
    return (defaults.deterministic_chunk,) if options.deterministic else defaults.prefill_buckets


def _prefill_rows(buckets: tuple[int, ...]) -> int:
    """Return how many prompts a prefill step packs; buckets that are not usable are refused by `EngineConfig`."""
    whole = [size for size in buckets if type(size) is int] if isinstance(buckets, tuple) else []
    return max(_FEWEST_PROMPTS, max(whole, default=0) // _TOKENS_PER_PROMPT)


def _decode_buckets(options: Asked, defaults: Defaults, slots: int, dtype: str) -> tuple[int, ...]:
    if options.decode_buckets is not None:
        return options.decode_buckets
    if options.deterministic:
        return (slots,)
    # XLA CPU multiplies one 16-bit row 9 times slower than 8 rows.
    is_one_fast = dtype == "float32" or (dtype == "bfloat16" and defaults.has_kernels)
    rows = (size for size in defaults.decode_buckets if size > 1 or is_one_fast)
    return (*(size for size in rows if size < slots), slots)


def as_table() -> str:
    """Describe the defaults in a Markdown table, for the reference."""

    def numbers(values: tuple[int, ...]) -> str:
        return ", ".join(f"{value:,}" for value in values)

    kinds = list(TABLE)
    rows = [
        ("`max_num_seqs`", [f"{kind.max_num_seqs}" for kind in kinds]),
        ("`prefill_buckets`; the last is the chunk", [numbers(kind.prefill_buckets) for kind in kinds]),
        ("the same where `deterministic`", [f"{kind.deterministic_chunk:,}" for kind in kinds]),
        ("prompts packed into a prefill step", [f"{_prefill_rows(kind.prefill_buckets)}" for kind in kinds]),
        ("`decode_buckets` below `max_num_seqs`", [numbers(kind.decode_buckets) for kind in kinds]),
        ("staging of hand-offs, of the KV memory", [f"1/{kind.staging_part}" for kind in kinds]),
        ("programs compiled at a time", ["half of the cores, 2 to 16"] * len(kinds)),
    ]
    lines = ["| | " + " | ".join(kind.name for kind in kinds) + " |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines) + "\n"
