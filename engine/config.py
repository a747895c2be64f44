"""The engine's frozen configuration, checked when it is made. No JAX here.

A `Topology` says which meshes exist and what each is for; an `EngineConfig` adds lengths, pages and buckets. Every
message says what to change. Nothing here looks at devices or memory: `sharding/mesh.py` and `startup/memory.py` do.
"""

import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from .kv_dtypes import KVDtype, KVDtypes, same_everywhere
from .protocol.service import SLO
from .roles import check_roles
from .topology import MeshSpec, Role, Topology

# Of activations and weights that are not quantised; KV may be stored as something else (`kv_dtypes.py`).
DTYPES = ("float32", "bfloat16", "float16")
# What becomes of quantised weights, and what the activations that they multiply are rounded to.
QUANTIZATIONS = ("auto", "keep", "none")
# Names of what quantised a checkpoint, as vLLM has them, which its files have to agree with.
METHODS = ("awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gguf", "gptq", "int8", "mxfp4")
# What `twinmesh convert` rounds weights to.
ROUNDINGS = ("int8", "fp8", "mxfp4")
ACTIVATIONS: tuple[Literal["int16", "int8", "float"], ...] = ("int16", "int8", "float")
# Of which distribution log-probabilities are, by vLLM's names: the model's, or what the token was drawn from.
LOGPROBS_MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


class GpuShare(float):
    """A `memory_fraction` that was given as vLLM's `gpu_memory_utilization`: CPUs, which have none, leave it out."""


@dataclass(frozen=True)
class EngineConfig:
    """Lengths, buckets and modes of one engine; the same on every mesh.

    Raises:
        ValueError: a value out of range, buckets that do not ascend or do not reach `max_num_seqs`, or modes that
            exclude each other.
    """

    topology: Topology
    max_model_len: int  # prompt and completion together, in tokens
    page_size: int = 64  # tokens per KV page
    max_num_seqs: int = 32  # slots: the requests a mesh holds at once
    prefill_buckets: tuple[int, ...] = (64, 256, 512)  # token counts of prefill steps; the largest is the chunk size
    prefill_rows: int = 8  # requests packed into one prefill step
    decode_buckets: tuple[int, ...] = (1, 8, 32)  # row counts of decode steps
    dtype: str = "float32"  # of activations and weights that are not quantised: one of `DTYPES`
    kv: KVDtypes | None = None  # what keys and values are stored as; None: as `dtype`
    formats: tuple[str, ...] = ()  # of weights that are kept quantised: of `kernels_pallas/formats/layouts.py`
    activations: str = "int16"  # one of `ACTIVATIONS`: what kernels round them to where quantised weights multiply them
    windows: tuple[int | None, ...] = (None,)  # of each cache group, its attention window; None: all tokens are seen
    decode_steps: int = 1  # the most that one dispatch runs
    prefix_cache: bool = True  # prompts reuse the pages of earlier ones
    deterministic: bool = False  # the same tokens, whatever else runs
    max_retries: int = 2  # how often a request that lost its mesh starts again before it fails
    roles: tuple[Role, ...] = ()  # that the meshes of a pool begin with; empty: all do both, or there is no pool
    slo: SLO | None = None  # what answers are to keep to that have no SLO of their own
    handoff_factor: int = 4  # each size of a transfer is so many times the one before
    # What a level of priority is worth in seconds of waiting, and how long a prompt that does not fit may be passed
    # over. 0: priorities count for nothing where the order is of arrival, and nothing is passed over.
    age_seconds: float = 60.0
    max_waiting: int | None = None  # interactive requests that wait and never began; None: any number
    max_waiting_tokens: int | None = None  # their prompt tokens to compute; None: likewise
    logprobs_mode: str = "raw_logprobs"  # one of `LOGPROBS_MODES`
    max_logprobs: int = 20  # the most likely tokens that programs report log-probabilities of

    def __post_init__(self) -> None:
        # A prompt and one more token is the least that can be served.
        for name, least in (
            ("max_model_len", 2), ("page_size", 1), ("max_num_seqs", 1), ("prefill_rows", 1), ("decode_steps", 1),
            ("max_retries", 0), ("handoff_factor", 2), ("max_logprobs", 0),
        ):  # fmt: skip
            check_whole_number(name, getattr(self, name), least)
        check_seconds("age_seconds", self.age_seconds)
        for name in ("max_waiting", "max_waiting_tokens"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), 1)
        for name in ("prefill_buckets", "decode_buckets"):
            _check_buckets(name, getattr(self, name))
        if self.decode_buckets[-1] < self.max_num_seqs:
            raise ValueError(
                f"decode_buckets={self.decode_buckets} do not hold max_num_seqs={self.max_num_seqs} requests: "
                "let the last bucket be at least max_num_seqs."
            )
        check_roles(self.roles, self.topology)
        check_slo(self.slo)
        is_to_plan = self.slo is not None and self.slo.percentile is not None
        if is_to_plan and self.topology.is_pool and not self.has_handoffs:
            raise ValueError(
                f"topology '{self.topology}' and an SLO with a percentile: a pool of one mesh has no roles to plan: "
                f"write '{str(self.topology).replace('pool', 'both')}', or give the pool more meshes."
            )
        if self.deterministic:
            self._check_deterministic()

    def _check_deterministic(self) -> None:
        """Refuse settings that need several programs for a phase: programs of other shapes may round differently."""
        for name in ("prefill_buckets", "decode_buckets"):
            if len(getattr(self, name)) > 1:
                raise ValueError(f"deterministic=True needs one size in {name}, not {getattr(self, name)}: give one.")
        if self.decode_steps > 1:
            raise ValueError(f"deterministic=True does not go with decode_steps={self.decode_steps}: use 1.")
        if any(spec.fused for spec in self.topology.meshes):
            raise ValueError(f"deterministic=True does not go with {self.topology}: use both without mode=fused.")

    @property
    def scores_processed(self) -> bool:
        """Return whether log-probabilities are of the distribution that tokens are drawn from, not of the model's."""
        return self.logprobs_mode.startswith("processed")

    @property
    def scores_logits(self) -> bool:
        """Return whether logits are reported in place of log-probabilities."""
        return self.logprobs_mode.endswith("logits")

    @cached_property
    def chunk_size(self) -> int:
        """Return the most prompt tokens of one step."""
        return self.prefill_buckets[-1]

    @property
    def scored_rows(self) -> int:
        """Return after how many tokens of prompts others are scored at a time: as many as a decode step has rows, 8 to
        64, so that scoring takes no more memory than generating does."""
        return min(max(8, self.decode_buckets[-1]), 64)

    @cached_property
    def max_pages(self) -> int:
        """Return the pages of the longest request, which is the width of a page table."""
        return self.pages_for(self.max_model_len)

    @cached_property
    def handoff_buckets(self) -> tuple[int, ...]:
        """Return the page counts that transfers are padded to: powers of `handoff_factor`, then a whole request's."""
        sizes, size = [], 1
        while size < self.max_pages:
            sizes.append(size)
            size *= self.handoff_factor
        return (*sizes, self.max_pages)

    def starting_role(self, mesh: int) -> Role:
        """Return the role that a mesh begins with, which outside of pools it keeps."""
        if self.roles:
            return self.roles[mesh]
        return Role.BOTH if self.topology.is_pool else self.topology.meshes[mesh].role

    @property
    def plans_roles(self) -> bool:
        """Return whether the engine plans its meshes' roles: there are several, in a pool, and a target to plan by."""
        return self.topology.is_pool and self.has_handoffs and self.slo is not None and self.slo.percentile is not None

    @property
    def has_handoffs(self) -> bool:
        """Return whether KV may move between meshes: from prefill to decode, or from one decoding mesh to another."""
        return len(self.topology.meshes) > 1

    @cached_property
    def kv_dtypes(self) -> KVDtypes:
        """Return what keys and values are stored as."""
        return same_everywhere(self.dtype) if self.kv is None else self.kv

    def kv_on(self, spec: MeshSpec) -> KVDtype:
        """Return what keys and values are stored as on a mesh."""
        return self.kv_dtypes.on(spec.role)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def kv_tokens(self, pages: Sequence[int]) -> int:
        """Return the tokens of KV that so many pages of each cache group hold; those with a window do not limit it."""
        whole = [count for count, window in zip(pages, self.windows, strict=True) if window is None]
        return self.page_size * min(whole, default=self.max_num_seqs * self.max_pages)

    def most_pages(self, window: int | None) -> int:
        """Return the most pages that one request holds in a group: all, or its window and the chunk being prefilled."""
        if window is None:
            return self.max_pages
        return min(self.max_pages, self.pages_for(window + self.chunk_size) + 1)

    def pages_to_send(self, window: int | None) -> int:
        """Return the most pages of a group that a transfer carries: all, or those in the next token's window."""
        return self.max_pages if window is None else min(self.max_pages, self.pages_for(window) + 1)


@dataclass(frozen=True)
class PoolSize:
    """One mesh's KV memory."""

    pages: tuple[int, ...]  # of each cache group
    page_bytes: tuple[int, ...]  # of one page of each
    staging_bytes: int  # that hand-offs on their way may take; 0: it takes part in none
    state_bytes: int = 0  # of a request's state, which goes along with every transfer
    sent_bytes: tuple[int, ...] | None = None  # of a page of each as hand-offs carry it; None: as it lies

    def transfer_bytes(self, bucket: int, caps: Sequence[int]) -> int:
        """Return the bytes of a transfer of `bucket` pages; `caps` are the groups' `EngineConfig.pages_to_send`."""
        pages = sum(min(bucket, cap) * size for cap, size in zip(caps, self.sent_pages, strict=True))
        return pages + self.state_bytes

    @property
    def sent_pages(self) -> tuple[int, ...]:
        """Return the bytes of a page of each group on its way: as the meshes that decode store it."""
        return self.page_bytes if self.sent_bytes is None else self.sent_bytes


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `size`; `buckets` ascend, and the last one holds it."""
    return buckets[bisect_left(buckets, size)]


def check_whole_number(name: str, value: object, least: int) -> None:
    """Raise ValueError, naming the option, unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not usable: it must be a whole number, {least} or more.")


def check_slo(value: object) -> None:
    """Raise ValueError unless `value` is an SLO or None."""
    if value is not None and not isinstance(value, SLO):
        raise ValueError(f"slo={value!r} is not usable: it must be an SLO, such as SLO(ttft_ms=500, tpot_ms=50).")


def check_fraction(name: str, value: object) -> None:
    """Raise ValueError, naming the option, unless `value` is a number above 0 and at most 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is not usable: it must be a number above 0 and at most 1.")


def check_seconds(name: str, value: object) -> None:
    """Raise ValueError, naming the option, unless `value` is a finite number of seconds, 0 or more."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} is not usable: it must be a number of seconds, 0 or more.")


def _check_buckets(name: str, buckets: object) -> None:
    wanted = f"{name}={buckets!r} is not usable: give ascending whole numbers, 1 or more, in a tuple."
    if not isinstance(buckets, tuple) or not buckets or not all(type(bucket) is int for bucket in buckets):
        raise ValueError(wanted)
    if buckets[0] < 1 or not all(a < b for a, b in pairwise(buckets)):
        raise ValueError(wanted)
