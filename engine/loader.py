"""From a model's name and a few options to a running engine: everything that happens once, at start-up.

In this order, so that mistakes show before work is done: topology and dtype, the model's files, devices, weights,
the size of the KV pools, compilation.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tqdm import tqdm

from ..models.catalog import cache_directory, resolve_model
from ..models.chat import ChatTemplate
from ..models.checkpoint import Checkpoint, load_params, open_checkpoint
from ..models.decoder import AbstractParams, abstract_params
from ..models.tokenizer import Tokenizer
from .compilation import use_cache
from .config import DTYPES, EngineConfig, PoolSize, Role, Topology, check_whole_number
from .core import EngineCore
from .executor import Completion, Executor, MeshExecutor
from .kv_cache import abstract_state, memory_for_kv, page_bytes, pool_that_fits
from .mesh import build_meshes, sharding
from .programs import MeshPlan, Params, compile_programs
from .scheduler import Scheduler


@dataclass(frozen=True)
class Options:
    """What `LLM` takes besides the model and how it is named; see there. None: found at start-up."""

    topology: Topology
    dtype: DTypeLike
    max_model_len: int | None
    page_size: int
    max_num_seqs: int
    prefill_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...] | None
    kv_cache_bytes: int | None
    devices: Sequence[jax.Device] | None
    progress: bool


@dataclass(frozen=True)
class Engine:
    """A running engine and what its callers need around it."""

    core: EngineCore
    config: EngineConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate


def start_engine(model: str | Path, options: Options) -> Engine:
    """Load, size, compile, run.

    Raises:
        ValueError: anything wrong with the options, the model's files, the devices or the memory, in one sentence.
    """
    dtype = _parse_dtype(options.dtype)
    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer, chat_template = checkpoint.tokenizer(), checkpoint.chat_template()
    config = _engine_config(options, dtype, checkpoint.config.max_position)
    meshes = build_meshes(options.topology, options.devices)
    use_cache(cache_directory() / "compiled")
    params = abstract_params(checkpoint.config, dtype)
    weights = _load_weights(checkpoint, params, dtype, meshes, options.progress)
    config, pools = _size_pools(config, options, checkpoint, dtype, meshes)
    plans = [
        MeshPlan(
            mesh, spec, checkpoint.config, params, config,
            abstract_state(checkpoint.config, config, pool.pages, dtype, mesh),
        )
        for mesh, spec, pool in zip(meshes, options.topology.meshes, pools, strict=True)
    ]  # fmt: skip
    programs = compile_programs(plans, progress=options.progress)
    executors = [MeshExecutor(*parts) for parts in zip(plans, programs, weights, strict=True)]

    def executor(post: Callable[[Completion], None]) -> Executor:
        return Executor(executors, post, time.monotonic)

    core = EngineCore(Scheduler(config, pools), executor, time.monotonic)
    return Engine(core, config, tokenizer, chat_template)


def _parse_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use one of {', '.join(DTYPES)}.")
    return parsed


def _engine_config(options: Options, dtype: jnp.dtype, max_position: int) -> EngineConfig:
    """Checked before any work; `max_model_len` is the model's for now where none was asked for."""
    asked, seqs = options.max_model_len, options.max_num_seqs
    check_whole_number("max_num_seqs", seqs, 1)
    if options.kv_cache_bytes is not None:
        check_whole_number("kv_cache_bytes", options.kv_cache_bytes, 1)
    # A matrix product of one bfloat16 row is 9 times slower than one of 8 rows on XLA CPU; on GPUs 8 cost as much as 1.
    small = (1, 8, 32, 128) if dtype == jnp.float32 else (8, 32, 128)
    default_buckets = (*(rows for rows in small if rows < seqs), seqs)
    config = EngineConfig(
        topology=options.topology,
        max_model_len=max_position if asked is None else asked,
        page_size=options.page_size,
        max_num_seqs=seqs,
        prefill_buckets=options.prefill_buckets,
        decode_buckets=default_buckets if options.decode_buckets is None else options.decode_buckets,
    )
    if config.max_model_len > max_position:
        raise ValueError(f"max_model_len={asked} is more than the model's context of {max_position} tokens: lower it.")
    return config


def _load_weights(
    checkpoint: Checkpoint, params: AbstractParams, dtype: jnp.dtype, meshes: Sequence[Mesh], progress: bool
) -> list[Params]:
    """One tuple of arrays per mesh; each tensor is read and dequantised once."""

    def put(path: str, array: np.ndarray) -> tuple[jax.Array, ...]:
        return tuple(jax.device_put(array, sharding(mesh, params.specs[path].axes)) for mesh in meshes)

    bar: Callable[[Iterable[str]], Iterable[str]] = partial(tqdm, desc="weights", disable=not progress)
    return list(zip(*load_params(checkpoint, dtype, put, progress=bar), strict=True))


def _size_pools(
    config: EngineConfig, options: Options, checkpoint: Checkpoint, dtype: jnp.dtype, meshes: Sequence[Mesh]
) -> tuple[EngineConfig, list[PoolSize]]:
    """Pools per mesh. A length nobody asked for shrinks to what fits; one that was asked for must fit."""
    per_page = page_bytes(checkpoint.config, config.page_size, dtype)
    budgets = memory_for_kv(meshes, options.kv_cache_bytes)
    if options.max_model_len is None:
        # A mesh that takes part in hand-offs sets as much aside for one on its way.
        share = 1 if all(spec.role is Role.BOTH for spec in config.topology.meshes) else 2
        fits = min(budgets) // per_page // share * config.page_size
        config = replace(config, max_model_len=min(config.max_model_len, max(config.page_size, fits)))
    specs = config.topology.meshes
    return config, [pool_that_fits(b, per_page, config, spec) for b, spec in zip(budgets, specs, strict=True)]
